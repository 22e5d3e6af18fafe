"""The errors that are no defects, so that callers can tell them from those."""


class InputError(ValueError):
  """Bad input: the message names the thing, what was found, and the fix.

  `main.py` prints the message and exits with status 2; every other exception
  is a defect and keeps its traceback.
  """


class Preempted(Exception):
  """The process was asked to stop and has saved where it is.

  `main.py` prints the message and exits with status 143, as SIGTERM would.
  """

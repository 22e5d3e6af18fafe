"""Exceptions for user errors and requested stops, not bugs."""


class InputError(ValueError):
  """Bad input; the message names the thing, its value and the fix.

  `main.py` prints the message and exits with status 2; every other exception
  is a bug and keeps its traceback.
  """


class Preempted(Exception):
  """A stop on request, after the process has saved its state.

  `main.py` prints the message and exits with status 143, as SIGTERM would.
  """

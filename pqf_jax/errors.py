"""The one error type for bad input, so that callers can tell it from a bug."""


class InputError(ValueError):
  """Bad input: the message names the thing, what was found, and the fix.

  `main.py` prints the message and exits with status 2; every other exception
  is a defect and keeps its traceback.
  """

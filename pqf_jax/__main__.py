"""The command line: `pqf-jax`, `python -m pqf_jax` and `python main.py`."""

import argparse
import os
import sys
from collections.abc import Sequence

from pqf_jax import errors, extras
from pqf_jax.runtime import files


def main() -> None:
  """Runs `inspect` or `cli.main`, and ends the process.

  Bad input and a missing library are one message, with exit status 2.
  """
  try:
    if sys.argv[1:2] == ["inspect"]:
      _inspect(sys.argv[2:])
    else:
      from pqf_jax import cli  # needs libraries that the core does without

      cli.main()
  except ModuleNotFoundError as missing:
    _fail(extras.explain(missing))
  except (errors.InputError, OSError) as error:
    _fail(error)


def _fail(error: Exception) -> None:
  print(f"error: {error}", file=sys.stderr)
  sys.exit(2)


def _inspect(arguments: Sequence[str]) -> None:
  """Prints what is in a packed file, and writes a page about it."""
  parser = argparse.ArgumentParser(
    prog="pqf-jax inspect", description="Shows what is in a packed file."
  )
  parser.add_argument("file", metavar="FILE", help="the packed file")
  parser.add_argument("--html", metavar="PAGE", help="also writes a page")
  given = parser.parse_args(arguments)
  if given.html:
    from pqf_jax import report  # needs the extra report

    if os.path.realpath(given.html) == os.path.realpath(given.file):
      raise errors.InputError(
        f"--html {given.html} is the packed file itself; give the name of a "
        "page, such as inspection.html"
      )
    files.check_regular(given.html)  # a page would take a device's place
  from pqf_jax import inspection

  found = inspection.inspect(given.file)
  print(found)
  if given.html:
    report.write_inspection(given.html, found)
    print(f"\nwritten: {given.html}")


if __name__ == "__main__":
  main()

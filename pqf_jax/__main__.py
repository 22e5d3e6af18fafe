"""The command line: `pqf-jax`, `python -m pqf_jax` and `python main.py`."""

import sys

from pqf_jax import errors, extras


def main() -> None:
  """Runs `cli.main`; a missing library is one message, with exit status 2."""
  try:
    from pqf_jax import cli  # needs libraries that the core does without

    cli.main()
  except ModuleNotFoundError as missing:
    error: errors.InputError = extras.explain(missing)
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  main()

"""The command line: `python main.py --config=configs/resnet18.py`."""

import difflib
import os
import re
import resource
import runpy
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from pqf_jax import errors, pipeline
from pqf_jax.pipeline import settings
from pqf_jax.runtime import xla_flags

_CONFIG = config_flags.DEFINE_config_file(
  "config", help_string="A recipe from configs/.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where checkpoints and results go; default runs/<name>."
)


def main() -> None:
  """Runs the recipe that the command line names, and ends the process.

  Exit status: 0 when all is done, 2 for bad input (one line says what), 143
  when the process was asked to stop and has saved.
  """
  xla_flags.set_defaults()
  for name in ("config", "workdir"):
    # So that --help of whatever script calls this shows them.
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])
  try:
    app.run(_run, flags_parser=_parse_flags)
  except errors.Preempted as stopped:
    print(stopped, file=sys.stderr)
    sys.exit(143)
  except (errors.InputError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def _run(argv: list[str]) -> None:
  del argv
  if _CONFIG.value.mode == "preflight":
    _grow_stack()
  # Orbax logs every write, and with a traceback what it raises anyway.
  logging.set_verbosity(logging.FATAL)
  pipeline.run(_CONFIG.value, _WORKDIR.value)


def _parse_flags(argv: list[str]) -> list[str]:
  """Runs absl's parser; a bad recipe or setting becomes an `InputError`."""
  try:
    rest = flags.FLAGS(argv)
  except (flags.Error, AttributeError, KeyError, ValueError) as error:
    # ml_collections puts the whole traceback into what a recipe raised, whose
    # message comes last.
    message = str(error).strip().splitlines()
    reason = message[-1] if "Traceback" in str(error) else " ".join(message)
    _check_keys(argv)
    raise errors.InputError(f"{' '.join(argv[1:])}: {reason}") from error
  if not flags.FLAGS["config"].present:
    raise errors.InputError(
      "no recipe given: python main.py --config=configs/resnet18.py"
    )
  name = config_flags.get_config_filename(flags.FLAGS["config"])
  path, _, _ = name.partition(":")
  if not os.path.isfile(path):
    raise errors.InputError(
      f"no recipe {path!r} in {os.getcwd()}; run main.py in its own folder, "
      "where the recipes are configs/*.py"
    )
  if rest[1:]:
    raise errors.InputError(
      f"unknown argument {rest[1]!r}; settings are given as --config.KEY=VALUE"
    )
  return rest


def _check_keys(argv: list[str]) -> None:
  """Refuses --config.KEY where the recipe has no such setting.

  Raises:
    InputError: names the settings whose names are nearest.
  """
  known = _known_keys(argv)
  for argument in argv if known else ():
    match = re.match(r"--?config\.([^=]+)", argument)
    if match is None or match[1] in known:
      continue
    last = match[1].rpartition(".")[2]
    near = [key for key in known if key.rpartition(".")[2] == last]
    near += difflib.get_close_matches(match[1], known, 2)
    hint = " or ".join(f"config.{key}" for key in dict.fromkeys(near))
    raise errors.InputError(
      f"no setting is named config.{match[1]}"
      + (f"; did you mean {hint}?" if hint else "")
    )


def _known_keys(argv: list[str]) -> list[str]:
  """Lists the settings of the recipe in argv; none if it cannot be read."""
  recipes = [m[1] for a in argv if (m := re.fullmatch(r"--?config=(.+)", a))]
  path, colon, variant = "".join(recipes[:1]).partition(":")
  if not os.path.isfile(path):
    return []
  get_config = runpy.run_path(path)["get_config"]
  try:
    config = get_config(variant) if colon else get_config()
  except ValueError:  # no such variant, as absl's parser has found
    return []
  return list(settings.flatten(config.to_dict()))


def _grow_stack() -> None:
  """Starts this program again with an unlimited stack, where it has less.

  The threads of libtpu 0.0.42 overflow theirs on large programs (ResNet-50 for
  v6e:4x4: a segmentation fault). Their size is fixed when a process starts.
  """
  limits = resource.getrlimit(resource.RLIMIT_STACK)
  if limits[0] != limits[1] == resource.RLIM_INFINITY:
    resource.setrlimit(resource.RLIMIT_STACK, (limits[1], limits[1]))
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

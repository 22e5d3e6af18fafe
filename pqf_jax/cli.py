"""The command line: `python main.py --config=configs/resnet18.py`.

Installed, it is `pqf-jax --recipe=resnet18` in any folder.
"""

import difflib
import os
import re
import resource
import runpy
import sys
from collections.abc import Iterator
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from pqf_jax import errors, pipeline, recipes
from pqf_jax.pipeline import settings
from pqf_jax.runtime import xla_flags

_CONFIG = config_flags.DEFINE_config_file(
  "config", help_string="A recipe from configs/.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where checkpoints and results go; default runs/<name>."
)
# The settings that most runs need, and what to write about them.
_SETTINGS = {
  "data.dir": "where the data set is",
  "data.unlabelled": "images without labels, for calibration and a teacher",
  "weights": "FILE, or hf://OWNER/REPO[/FILE]; empty: train from scratch",
  "rules": "what is compressed, and how: see pqf_jax.Rule",
  "calibrate.images": "training images that calibrate; 0: none",
  "finetune.epochs": "0: no training, the calibrated network is packed",
  "finetune.batch_size": "images of a step, over all devices",
  "finetune.learning_rate": "of the first step",
  "distillation.share": "of the loss that follows the dense network",
  "dtype": "of training steps: float32 or bfloat16",
  "seed": "of all that is random",
}


def main() -> None:
  """Runs the recipe that the command line names, and ends the process.

  Exit status: 0 when all is done, 143 when the process was asked to stop and
  has saved. What it raises `__main__` tells in one line.
  """
  xla_flags.set_defaults()
  if {"-h", "--help"} & {*sys.argv[1:]}:
    print(_help())
    return
  # Recipes import configs.common.
  sys.path.insert(0, os.fspath(recipes.folder().parent))
  try:
    app.run(_run, flags_parser=_parse_flags)
  except errors.Preempted as stopped:
    print(stopped, file=sys.stderr)
    sys.exit(143)


def _help() -> str:
  """Returns what --help prints."""
  defaults = settings.flatten(_common_config())
  tables: dict[str, dict[str, str]] = {
    "recipes": {name: recipes.summary(name) for name in recipes.names()},
    "modes, --config.mode=MODE": settings.MODES,
    "settings, --config.NAME=VALUE [default]": {
      name: f"{text} [{defaults[name]}]" for name, text in _SETTINGS.items()
    },
  }
  lines = [
    "usage: pqf-jax --recipe=NAME[:VARIANT] [--workdir=DIR] [--config.KEY=V]",
    "       python main.py --config=FILE.py[:VARIANT] ...",
    "       pqf-jax inspect FILE [--html PAGE]",
    "",
    "Permutes, quantizes and fine-tunes a network, and packs it into one",
    "small file. Results go to --workdir, by default runs/NAME; the same",
    "command goes on where it stopped.",
  ]
  for title, rows in tables.items():
    lines += ["", f"{title}:"]
    lines += [f"  {name:22} {text}" for name, text in rows.items()]
  return "\n".join([*lines, "", f"all settings: {recipes.folder()}/common.py"])


def _common_config() -> dict[str, Any]:
  """Returns the settings that all recipes begin with."""
  common = runpy.run_path(os.fspath(recipes.folder() / "common.py"))
  return dict(common["get_config"]().to_dict())


def _run(argv: list[str]) -> None:
  del argv
  if _CONFIG.value.mode == "preflight":
    _grow_stack()
  # Orbax logs every write, and with a traceback what it raises anyway.
  logging.set_verbosity(logging.FATAL)
  pipeline.run(_CONFIG.value, _WORKDIR.value)


def _parse_flags(argv: list[str]) -> list[str]:
  """Runs absl's parser; a bad recipe or setting becomes an `InputError`."""
  words = list(_name_files(argv[1:]))
  # Settings are known once the recipe is.
  words.sort(key=lambda word: not re.match("--?config=", word))
  argv = [*argv[:1], *words]
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
      "no recipe given: python main.py --config=configs/resnet18.py, or "
      f"--recipe=NAME with one of {', '.join(recipes.names())}"
    )
  name = config_flags.get_config_filename(flags.FLAGS["config"])
  path, _, _ = name.partition(":")
  if not os.path.isfile(path):
    raise errors.InputError(
      f"no recipe {path!r} in {os.getcwd()}; give the file of one, or "
      f"--recipe=NAME with one of {', '.join(recipes.names())}"
    )
  if rest[1:]:
    raise errors.InputError(
      f"unknown argument {rest[1]!r}; settings are given as --config.KEY=VALUE"
    )
  return rest


def _name_files(argv: list[str]) -> Iterator[str]:
  """Puts --config=FILE in the place of --recipe=NAME and of '--recipe NAME'."""
  words = iter(argv)
  for word in words:
    name, equals, recipe = word.partition("=")
    if name in ("-recipe", "--recipe"):
      recipe = recipe if equals else next(words, "")
      word = f"--config={recipes.path(recipe)}"
    yield word


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

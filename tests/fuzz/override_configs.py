"""Runs the command with settings that make no sense.

    python -m tests.fuzz.override_configs [KEY ...]

Every case ends with status 2 and one line, before a workdir is made; or it is
accepted because it makes sense, and `ACCEPTED` says why. A job that comes to
its first stage is accepted, and not run.
"""

import os
import pathlib
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from unittest import mock

from absl import flags
from ml_collections import config_flags

from pqf_jax import __main__, errors, models
from pqf_jax.pipeline import settings, stages

ROOT = pathlib.Path(__file__).parents[2]
TINY = "tests/pipeline/tiny.py"
RESNET = "configs/resnet18.py"
DETECTOR = "configs/mask_rcnn.py:coco"
NUCLEI = "configs/mask_rcnn.py:nuclei"
# Of a process that came to its first stage.
BEGUN = 77
SECONDS = 60

WORDS = ("", "nosuch", "None", "0")
WHOLE = (
  *("0", "-1", "2147483647", "9223372036854775808"),
  *("1.5", "nan", "inf", "few", "", "None"),
)
REAL = ("0", "-1", "1e39", "nan", "inf", "-inf", "few", "", "None")
FLAG = ("2", "-1", "maybe", "None", "")
TUPLE = ("()", "0", "(0,)", "(nan,)", "None", "few", "")
DIGITS_DIR = ("nosuch", "/", "http://x")
CHANNELS = (
  *TUPLE,
  "(0,0,0)",
  "(-1,0.5,0.5)",
  "(1e39,1,1)",
  "(0.5,0.5)",
  "('a','b','c')",
  "(None,None,None)",
)
RULES = (
  *TUPLE,
  "('params',)",
  "(('params/.*',),)",
  "(('params/.*',0),)",
  "(('params/.*',-1,1,1),)",
  "(('params/.*',2**70,1,1),)",
  "(('params/.*',1.5,1,1),)",
  "(('params/.*','2',1,1),)",
  "(('params/.*',4,0,1),)",
  "(('params/.*',4,1,0),)",
  "(('params/.*',4,1,9999999999),)",
  "(('params/.*',4,1,1,1),)",
  "(('(',None),)",
  "((5,None),)",
  "(('nosuch',None),)",
)
TRAINING = {
  "epochs": WHOLE,
  "evaluation_epochs": WHOLE,
  "batch_size": WHOLE,
  "microbatches": WHOLE,
  "base_batch_size": WHOLE,
  "optimizer": WORDS,
  "learning_rate": REAL,
  "ema_decay": (*REAL, "1"),
  "final_learning_rate": REAL,
  "warmup_epochs": REAL,
  "weight_decay": REAL,
  "momentum": REAL,
}
# {key: values} of the tests' tiny job.
KEYS = {
  "mode": WORDS,
  "task": WORDS,
  "name": WORDS,
  "seed": WHOLE,
  "distributed": WORDS,
  "distributed_timeout": WHOLE,
  "compilation_cache": ("/proc/nosuch", "nosuch://x/y"),
  "compilation_cache_megabytes": WHOLE,
  "weights": ("nosuch", "None", "/", "http://x", "hf://", "nosuch://x/y"),
  "backbone": ("nosuch", "None", "/", "http://x"),
  "model": WORDS,
  "model.name": WORDS,
  "model.num_classes": WHOLE,
  "data": WORDS,
  "data.name": WORDS,
  "data.dir": DIGITS_DIR,
  "data.unlabelled": DIGITS_DIR,
  "data.image_size": (*WHOLE, "1", "16384"),
  "data.resize": (*WHOLE, "16384"),
  "data.crop": (*WHOLE, "16384"),
  "data.padding": WHOLE,
  "data.augmentation": (*WORDS, "flip,crop", "crop,random_resized_crop"),
  "data.num_objects": WHOLE,
  "data.mean": CHANNELS,
  "data.std": CHANNELS,
  "rules": RULES,
  "permute.search": WORDS,
  "permute.kmeans_steps": WHOLE,
  "quantize.annealed": FLAG,
  "calibrate": WORDS,
  "calibrate.images": WHOLE,
  "calibrate.rounds": WHOLE,
  "calibrate.damping": REAL,
  "finetune_from": WORDS,
  "frozen": (*TUPLE, "('(',)", "('nosuch',)", "(5,)", "params"),
  "dtype": (*WORDS, "float16"),
  "norm_statistics": WORDS,
  **{f"train.{name}": values for name, values in TRAINING.items()},
  "train.backbone_rate": (*REAL, "1.5"),
  **{f"finetune.{name}": values for name, values in TRAINING.items()},
  "distillation": WORDS,
  "distillation.share": (*REAL, "1.5"),
  "distillation.temperature": REAL,
  "distillation.mirrored": FLAG,
  "pack": WORDS,
  "eval_batch_size": WHOLE,
  "checkpoint_steps": WHOLE,
  "tensorboard": FLAG,
}


# {key: (why, values)}; all else is refused.
ACCEPTED = {
  "name": ("a name of a folder, which --workdir replaces", WORDS),
  "seed": ("a seed", ("0", "2147483647")),
  "distributed_timeout": ("as long as it takes", ("2147483647",)),
  "compilation_cache_megabytes": ("as many as it takes", ("2147483647",)),
  "data.image_size": ("the usual size; one pixel is an image", ("0", "1")),
  "data.resize": ("not resized; as is usual", ("0", "-1")),
  "data.crop": ("as is usual", ("0",)),
  "data.padding": ("none; as is usual", ("0", "-1")),
  "data.augmentation": ("as is usual", ("",)),
  "model.num_classes": ("counted", ("0",)),
  "train.backbone_rate": ("the backbone stays as it is", ("0",)),
  "data.num_objects": ("as many as there are; digits have none", ("0",)),
  "data.mean": ("those of the data set; black", ("()", "(0,0,0)")),
  "data.std": ("those of the data set", ("()",)),
  "permute.kmeans_steps": ("none", ("0",)),
  "calibrate.images": ("no calibration", ("0",)),
  "calibrate.rounds": ("no improvements", ("0",)),
  "frozen": ("none", ("()",)),
  "distillation.share": ("none", ("0",)),
  "checkpoint_steps": ("only evaluated epochs", ("2147483647",)),
  "finetune.epochs": ("no fine-tuning", ("0",)),
  "model.norm_epsilon": ("that of torchvision's weights", ("0",)),
} | {
  f"{stage}.{name}": why
  for stage in ("train", "finetune")
  for name, why in {
    "evaluation_epochs": ("only at the end", ("2147483647",)),
    "base_batch_size": ("rates as they are; tiny ones", ("0", "2147483647")),
    "final_learning_rate": ("falls to nothing", ("0",)),
    "warmup_epochs": ("none", ("0",)),
    "weight_decay": ("none", ("0",)),
    "momentum": ("none", ("0",)),
    "ema_decay": ("none", ("0",)),
  }.items()
}
# What they name must be read or built before they can be refused, or their
# values depend on other settings.
NEED_MORE = {
  "data.dir",
  "compilation_cache",
  "data.unlabelled",
  "weights",
  "backbone",
  "model.name",
  "model.depth",
  "model.stem",
  "model.min_size",
  "model.max_size",
  "data.name",
  "data.image_size",
  "data.resize",
  "data.crop",
  "rules",
  "frozen",
  "image",
} | {
  f"{stage}.{name}"
  for stage in ("train", "finetune")
  for name in ("epochs", "batch_size", "microbatches", "optimizer")
  + ("learning_rate", "final_learning_rate", "warmup_epochs")
}


class Case(NamedTuple):
  """A setting of a recipe; `more` are arguments beside it."""

  key: str
  value: str
  recipe: str = TINY
  more: tuple[str, ...] = ()

  def arguments(self) -> list[str]:
    """Returns the command line without --workdir."""
    setting = f"--config.{self.key}={self.value}"
    return [f"--config={self.recipe}", *self.more, setting]


def cases() -> Iterator[Case]:
  """Yields all cases."""
  for key, values in KEYS.items():
    for value in values:
      yield Case(key, value)
  plan = ("--config.mode=plan",)
  for key, values in {
    "depth": WHOLE,
    "num_classes": WHOLE,
    "stem": WORDS,
  }.items():
    for value in values:
      yield Case(f"model.{key}", value, RESNET, plan)
  for key in ("num_classes", "min_size", "max_size"):
    for value in WHOLE:
      if (key, value) != ("num_classes", "0"):  # which others accept
        yield Case(f"model.{key}", value, DETECTOR, plan)
  for value in REAL:
    yield Case("model.norm_epsilon", value, DETECTOR, plan)
  for value in (*TUPLE, "((0,),)*5", "((-1,),(2,),(3,),(4,),(5,))"):
    yield Case("model.anchor_sizes", value, NUCLEI, plan)
  for value in WORDS:
    yield Case("image", value, DETECTOR, ("--config.mode=predict",))


def is_accepted(case: Case) -> bool:
  """Whether the case makes sense."""
  return case.value in ACCEPTED.get(case.key, ("", ()))[1]


def check(case: Case) -> None:
  """Reads and checks the settings of a case, and does no more.

  Raises:
    InputError: they can never be right.
  """
  values = flags.FlagValues()
  config_flags.DEFINE_config_file(
    "config", flag_values=values, lock_config=True
  )
  try:
    # ml_collections looks for settings there, not in what it is given.
    with mock.patch.object(sys, "argv", ["main.py", *case.arguments()]):
      values(sys.argv)
  except (flags.Error, AttributeError, KeyError, ValueError) as error:
    raise errors.InputError(str(error)) from error
  settings.check(values["config"].value)


def fault(case: Case, folder: pathlib.Path) -> str:
  """Runs a case as a command of its own; returns what is wrong with its end.

  Args:
    case: any of `cases`.
    folder: an empty one.

  Returns:
    '' if nothing is.
  """
  workdir, output = folder / "run", folder / "told"
  child = os.fork()
  if not child:
    _become([*case.arguments(), f"--workdir={workdir}"], output)
  code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  told = output.read_text().splitlines()
  if is_accepted(case):
    return "" if code in (0, BEGUN) else f"status {code}: {told[-1:]}"
  lines = [line for line in told if line.startswith("error: ")]
  if code != 2 or lines != told[-1:]:
    return f"status {code}: {told[-1:]}"
  return "the workdir is made" if workdir.exists() else ""


def _become(arguments: Sequence[str], output: pathlib.Path) -> None:
  """Runs the command in this process, which ends with it."""
  status = 1
  signal.alarm(SECONDS)
  target = os.open(output, os.O_CREAT | os.O_WRONLY)
  os.dup2(target, 1)
  os.dup2(target, 2)
  sys.argv = ["main.py", *arguments]
  try:
    __main__.main()
    status = 0
  except SystemExit as end:
    status = end.code if isinstance(end.code, int) else 0
  except BaseException:  # as Python would end
    traceback.print_exc()
  finally:
    sys.stdout.flush()
    os._exit(status)


def faults(
  chosen: Sequence[str], folder: pathlib.Path
) -> Iterator[tuple[Case, str]]:
  """Yields (case, what is wrong or '') of the keys, or of all.

  Nothing may have used a device of jax in this process, which is forked.
  """
  os.chdir(ROOT)
  os.environ["JAX_PLATFORMS"] = "cpu"
  models.register("tiny", "tests.pipeline.tiny")
  stages.dense_stage = lambda job: os._exit(BEGUN)
  for number, case in enumerate(cases()):
    if not chosen or case.key in chosen:
      own = folder / str(number)
      own.mkdir()
      yield case, fault(case, own)


def main() -> None:
  """Runs all cases, or those of the keys that are given."""
  count = wrong = 0
  with tempfile.TemporaryDirectory() as folder:
    for case, problem in faults(sys.argv[1:], pathlib.Path(folder)):
      count += 1
      wrong += bool(problem)
      if problem:
        sys.stdout.write(f"{' '.join(case.arguments())}: {problem}\n")
  sys.stdout.write(f"{count} cases, {wrong} wrong\n")
  sys.exit(bool(wrong))


if __name__ == "__main__":
  main()

"""What the stages of one run share, resolved and checked before any work."""

import time
import zlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import ml_collections

from pqf_jax import errors, models, pack, report
from pqf_jax.core import plan as plans
from pqf_jax.core import vq_array
from pqf_jax.permutation import search
from pqf_jax.pipeline import summary, tasks, weights, workspace
from pqf_jax.runtime import checkpoint, distributed, progress

PyTree = Any
Record = checkpoint.Record
# The stages that train; a config has settings of each.
TRAININGS = ("train", "finetune")
# What `config.permute.search` may name.
SEARCHES = {
  "assignment": search.search_permutation,
  "paper": search.search_like_authors,
  "none": search.keep_order,
}


class Job(NamedTuple):
  """What the stages share.

  Attributes:
    config: the recipe.
    files: of this run.
    module: the Flax module.
    template: its dense variables, as shapes.
    plan: what is compressed, and how.
    weights: dense variables read from `config.weights`, or None where the
      network is trained first.
    backbone: {path: variable} that stage 0 begins with.
    task: its data, loss and evaluation.
  """

  config: ml_collections.ConfigDict
  files: workspace.Workspace
  module: Any
  template: PyTree
  plan: plans.CompressionPlan
  weights: PyTree | None
  backbone: dict[str, Any]
  task: tasks.Task

  def key(self, stage: str) -> jax.Array:
    """The stage's own random key, whatever ran before."""
    key = jax.random.key(self.config.seed)
    return jax.random.fold_in(key, zlib.crc32(stage.encode()))

  def run(
    self,
    stage: str,
    target: PyTree,
    compute: Callable[[], tuple[PyTree, Record]],
  ) -> tuple[PyTree, Record]:
    """A stage from its checkpoint, or computed, timed and saved."""

    def timed() -> tuple[PyTree, Record]:
      start = time.perf_counter()
      tree, record = compute()
      # A resumed training counts the seconds of its earlier runs itself.
      return tree, {"seconds": time.perf_counter() - start} | record

    return self.files.checkpoints.restore_or_compute(stage, target, timed)


def prepare(
  config: ml_collections.ConfigDict, files: workspace.Workspace
) -> Job:
  """Resolves everything that can be refused before any long work."""
  check_choice("task", config.task, tasks.TASKS)
  check_choice("pack", config.pack, ("last", "best"))
  check_choice("permute.search", config.permute.search, SEARCHES)
  module, template = build_model(config)
  plan = make_plan(config, template)
  print_plan(plan, template)
  variables = None
  if config.weights:
    stored = read_weights(config, module, template)
    variables = vq_array.decode_params(stored)  # of a file packed before
  elif not config.train.epochs:
    raise errors.InputError(
      "nothing to compress: give --config.weights=FILE.safetensors, or train "
      "from scratch with --config.train.epochs=N"
    )
  backbone = (
    weights.read_backbone(config.backbone, dict(config.model), template)
    if config.backbone
    else {}
  )
  check_batches(config, [s for s in TRAININGS if config[s].epochs])
  task = tasks.load(config, module)
  _check_training(config, task.num_train)
  files.claim()
  return Job(config, files, module, template, plan, variables, backbone, task)


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
  """Refuses a setting that is none of the known ones.

  Raises:
    InputError: names the setting, its value and the choices.
  """
  if value not in (choices := tuple(known)):
    raise errors.InputError(
      f"config.{name} is {value!r}; it must be one of {choices}"
    )


def _check_training(config: ml_collections.ConfigDict, num_images: int) -> None:
  if not 0 <= config.distillation <= 1:
    raise errors.InputError(
      f"config.distillation is {config.distillation:g}; it is a share, 0 to 1"
    )
  for stage in TRAININGS:
    settings = config[stage]
    if settings.epochs and not 0 < settings.batch_size <= num_images:
      raise errors.InputError(
        f"config.{stage}.batch_size is {settings.batch_size}, but there are "
        f"{num_images} training images; choose 1 to {num_images}"
      )
    if settings.evaluation_epochs < 1:
      raise errors.InputError(
        f"config.{stage}.evaluation_epochs is {settings.evaluation_epochs}; "
        "give 1 to evaluate after every epoch, N after every N-th"
      )
    rates = settings.learning_rate, settings.final_learning_rate
    if not rates[0] >= rates[1] >= 0 or not rates[0]:
      raise errors.InputError(
        f"config.{stage} has learning rates {rates[0]:g} to {rates[1]:g}; the "
        "first must be positive and the last not above it"
      )


def check_batches(
  config: ml_collections.ConfigDict,
  stages: Iterable[str],
  *,
  num_devices: int | None = None,
) -> None:
  """Refuses a training or evaluation that the devices cannot share.

  Args:
    config: the recipe.
    stages: those of 'train' and 'finetune' that will run.
    num_devices: None: all of all processes.

  Raises:
    InputError: names the setting, and of batches the nearest that fit.
  """
  check_choice("norm_statistics", config.norm_statistics, tasks.NORM_AXES)
  check_choice("dtype", config.dtype, tasks.DTYPES)
  count = jax.device_count() if num_devices is None else num_devices
  distributed.check_divides(
    "config.eval_batch_size", config.eval_batch_size, count
  )
  for stage in stages:
    settings = config[stage]
    if settings.microbatches < 1 or settings.base_batch_size < 0:
      raise errors.InputError(
        f"config.{stage} has microbatches={settings.microbatches} and "
        f"base_batch_size={settings.base_batch_size}; the first must be at "
        "least 1, the second at least 0"
      )
    name = f"config.{stage}.batch_size"
    distributed.check_divides(
      name, settings.batch_size, count, settings.microbatches
    )


def build_model(config: ml_collections.ConfigDict) -> tuple[Any, PyTree]:
  """(module, its variables as shapes)."""
  arguments = dict(config.model)
  module = models.get_model(arguments.pop("name")).make(**arguments)
  sample = tasks.sample(config)
  return module, jax.eval_shape(module.init, jax.random.key(0), *sample)


def read_weights(
  config: ml_collections.ConfigDict, module: Any, template: PyTree
) -> PyTree:
  """The variables in `config.weights`, compressed or dense."""
  return weights.read(
    config.weights,
    config.model.name,
    template,
    norm_epsilon=module.norm_epsilon,
  )


def write_packed(
  config: ml_collections.ConfigDict,
  module: Any,
  files: workspace.Workspace,
  variables: PyTree,
) -> pack.PackedModel:
  """Packs the variables into the run's file, which all processes then see."""
  packed = pack.pack_model(
    variables,
    norm_epsilon=module.norm_epsilon,
    architecture=dict(config.model),
  )
  if distributed.is_lead():
    pack.write(files.packed_file, packed)
  distributed.barrier("packed")
  return packed


def make_plan(
  config: ml_collections.ConfigDict, template: PyTree
) -> plans.CompressionPlan:
  """The plan of the config's rules."""
  rules = [plans.Rule(*rule) for rule in config.rules]
  return plans.make_plan(rules, template)


def print_plan(
  plan: plans.CompressionPlan, template: PyTree
) -> plans.SizeReport:
  """Shows what will be done and how large the result will be."""
  size = plans.predict_size(plan, template)
  progress.show(report.plan_table(summary.plan_rows(size)))
  return size

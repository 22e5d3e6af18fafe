"""What a task must have; the stages and the preflight use nothing else."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import ml_collections

from pqf_jax import errors, finetune
from pqf_jax.models import contract as models

PyTree = Any
Shapes = dict[str, Any]
"""{field of a batch: tree of `jax.ShapeDtypeStruct`}."""


def teacher_settings(config: ml_collections.ConfigDict) -> dict[str, float]:
  """Returns the arguments of a loss that compares with a teacher's outputs."""
  wanted = config.distillation
  return {"share": wanted.share, "temperature": wanted.temperature}


# Settings of which not every task makes something, and their values where
# nothing is asked for.
UNASKED: Mapping[str, Any] = {
  "data.name": "",
  "data.unlabelled": "",
  "data.image_size": 0,
  "data.resize": -1,
  "data.crop": 0,
  "data.padding": -1,
  "data.augmentation": "",
  "data.mean": (),
  "data.std": (),
  "data.num_objects": 0,
  "data.length": 0,
  "data.vocabulary": "",
  "distillation.temperature": 1.0,
  "distillation.mirrored": False,
}


def refuse_unused(
  config: ml_collections.ConfigDict, used: Collection[str]
) -> None:
  """Refuses settings of `UNASKED` that a task would silently leave out.

  Args:
    config: the recipe.
    used: those that the task makes something of.

  Raises:
    InputError: another one is set.
  """
  for name in sorted(UNASKED.keys() - set(used)):
    part, _, last = name.partition(".")
    value, unasked = config[part].get(last, UNASKED[name]), UNASKED[name]
    if value != unasked:
      raise errors.InputError(
        f"config.{name} is {value!r}, of which task {config.task!r} makes "
        f"nothing; leave it at {unasked!r}"
      )


class LoadedTask(NamedTuple):
  """A task on the data of one config, for one network.

  Attributes:
    num_train: number of training images.
    train_batches: (batch_size, seed, start_step, num_steps) -> global batches.
    outputs: (variables, *inputs) -> what a compressed network is to give again:
      calibration and byte budgets look at it.
    samples: (variables, batch_size, num_batches, seed) -> inputs of `outputs`
      for each batch, of training images as they are augmented; each process
      gets all of them. Where the inputs hold a choice, such as of boxes, it is
      that of these dense variables.
    make_loss: whether batches have a teacher's outputs -> the loss of a
      training step, with a teacher by `teacher_settings`.
    make_teacher: dense variables -> a function that adds the teacher's outputs
      to a batch.
    evaluate: variables -> {metric: value} over all test images, with
      `Task.metrics` and `images` among them.
    pictures: {title: variables} -> PNG files for the report, that show what
      these networks do; may be empty.
    fingerprint: () -> text that is another one for other data, so that a run
      does not go on with them.
    labelled: the same on other training images, which have labels; None: all
      have. Stage 0 trains on them.
    hidden: of `Task.metrics`, those that tell nothing on these data; tables
      and charts leave them out.
    mask_fn: (*inputs) -> bool, False for padding, which calibration and byte
      budgets leave out; None: there is none. See `pqf_jax.calibrate_params`.
    beside: dense variables -> the task whose figures compare networks with
      these; None: figures need no other network.
  """

  num_train: int
  train_batches: Callable[..., Iterator[finetune.Batch]]
  outputs: Callable[..., PyTree]
  samples: Callable[[PyTree, int, int, int], list[tuple[Any, ...]]]
  make_loss: Callable[[bool], finetune.LossFn]
  make_teacher: Callable[[PyTree], Callable[[Any], Any]]
  evaluate: Callable[[PyTree], dict[str, float]]
  pictures: Callable[[Mapping[str, PyTree]], list[bytes]]
  fingerprint: Callable[[], str] = lambda: ""
  labelled: "LoadedTask | None" = None
  hidden: Collection[str] = ()
  mask_fn: Callable[..., jax.Array] | None = None
  beside: "Callable[[PyTree], LoadedTask] | None" = None

  def for_stage(self, stage: str) -> "LoadedTask":
    """Returns what 'train' or 'finetune' trains on."""
    return (stage == "train" and self.labelled) or self


class AbstractPrograms(NamedTuple):
  """The programs of a task without its data: shapes stand for images.

  Attributes:
    loss_fn: of the fine-tuning.
    train_batch: batch size -> {field: shape} of its batches.
    infer: (variables, batch) -> what the evaluation looks at.
    eval_batch: batch size -> {field: shape} of its batches.
  """

  loss_fn: finetune.LossFn
  train_batch: Callable[[int], Shapes]
  infer: Callable[[PyTree, Any], Any]
  eval_batch: Callable[[int], Shapes]


class Task(Protocol):
  """One kind of network.

  Optional members:
    count_classes(config) -> int: of the data, where `config.model.num_classes`
      is 0.
    predict(config, network, variables, folder) -> files written: what
      `config.mode=predict` does for one image.
    unit: what the report calls test samples, 'images' without it.

  Attributes:
    metrics: {name: label} of the figures that tables and charts show, in this
      order. By the first one an epoch is the best. results.json has all figures
      of an evaluation.
  """

  metrics: Mapping[str, str]

  def sample(self, config: ml_collections.ConfigDict) -> tuple[jax.Array, ...]:
    """Returns small inputs of the network's `apply`."""

  def check(
    self,
    config: ml_collections.ConfigDict,
    network: models.Network,
    template: PyTree,
    *,
    num_devices: int,
  ) -> None:
    """Refuses, before any work, what the task cannot train or evaluate.

    Args:
      config: the recipe.
      network: what the model made; see `pqf_jax.models.contract`.
      template: its variables as shapes.
      num_devices: devices that share a batch.

    Raises:
      InputError: names the setting, or the model and what it lacks.
    """

  def load(
    self, config: ml_collections.ConfigDict, network: models.Network
  ) -> LoadedTask:
    """Opens the data of the config.

    Raises:
      InputError: the data are missing, damaged, or do not fit the network.
    """

  def abstract_programs(
    self, config: ml_collections.ConfigDict, network: models.Network
  ) -> AbstractPrograms:
    """Returns what a preflight compiles; needs no data."""

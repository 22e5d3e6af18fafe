"""Resolves and checks what the stages of one run share, before any work."""

import inspect
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections

from pqf_jax import errors, finetune, models, pack, tasks
from pqf_jax.core import plan as plans
from pqf_jax.core import trees, vq_array
from pqf_jax.models import contract
from pqf_jax.pipeline import planning, settings, training, weights, workspace
from pqf_jax.runtime import checkpoint, distributed
from pqf_jax.runtime import files as storage

PyTree = Any
Record = checkpoint.Record
# The stages that train; a config has settings of each.
TRAININGS = ("train", "finetune")


class Job(NamedTuple):
  """What the stages share.

  Attributes:
    config: the recipe.
    files: the workdir of this run.
    network: the Flax module.
    template: its dense variables, as shapes.
    plan: what is compressed, and how; empty until rules for a number of bytes
      are chosen.
    weights: dense variables read from `config.weights`, or None where the
      network is trained first.
    backbone: {path: variable} that stage 0 begins with.
    task: loss, metrics and sample of the network.
    loaded: the task on the data of the config.
  """

  config: ml_collections.ConfigDict
  files: workspace.Workspace
  network: contract.Network
  template: PyTree
  plan: plans.CompressionPlan
  weights: PyTree | None
  backbone: dict[str, Any]
  task: tasks.Task
  loaded: tasks.LoadedTask

  def key(self, stage: str) -> jax.Array:
    """Returns the stage's own random key, whatever ran before."""
    key = jax.random.key(self.config.seed)
    return jax.random.fold_in(key, zlib.crc32(stage.encode()))

  def planned(self, rules: Sequence[Any]) -> "Job":
    """Returns the job with the plan of these rules, which it shows.

    Raises:
      InputError: `config.frozen` names nothing that they leave to train.
    """
    plan = planning.make_plan(self.config, self.network, self.template, rules)
    planning.print_plan(self.config, plan, self.template)
    shapes = plans.compressed_shapes(plan, self.template)
    finetune.check_frozen(self.config.frozen, shapes)
    return self._replace(plan=plan)

  def evaluated(
    self, variables: PyTree, **record: Any
  ) -> tuple[PyTree, Record]:
    """Returns the variables, and the record with their evaluation."""
    return variables, record | {"evaluation": self.loaded.evaluate(variables)}

  def run(
    self,
    stage: str,
    target: PyTree,
    compute: Callable[[], tuple[PyTree, Record]],
  ) -> tuple[PyTree, Record]:
    """Restores a stage from its checkpoint, or computes, times and saves it."""

    def timed() -> tuple[PyTree, Record]:
      start = time.perf_counter()
      tree, record = compute()
      # A resumed training counts the seconds of its earlier runs itself.
      return tree, {"seconds": time.perf_counter() - start} | record

    return self.files.checkpoints.restore_or_compute(stage, target, timed)


def prepare(
  config: ml_collections.ConfigDict, files: workspace.Workspace
) -> Job:
  """Resolves everything that can be refused before any long work.

  Raises:
    InputError: see the functions that it calls.
  """
  task = tasks.get(config.task)
  stages = [
    stage
    for stage in TRAININGS
    if config[stage].epochs and not (stage == "train" and config.weights)
  ]
  check_batches(config, stages)
  network, template = build_network(config)
  task.check(config, network, template, num_devices=jax.device_count())
  planning.check_target(config, network, template)
  plan = planning.make_plan(config, network, template)
  finetune.check_frozen(config.frozen, plans.compressed_shapes(plan, template))
  if not config.target_bytes:
    planning.print_plan(config, plan, template)
  variables = None
  if config.weights:
    stored = read_weights(config, network, template)
    variables = vq_array.decode_params(stored)  # it may be compressed already
  elif not config.train.epochs:
    raise errors.InputError(
      "nothing to compress: give --config.weights=FILE.safetensors, or train "
      "from scratch with --config.train.epochs=N"
    )
  backbone = {}
  if config.backbone and variables is None:
    backbone = weights.read_backbone(
      config.backbone,
      dict(config.model),
      template,
      norm_epsilon=contract.norm_epsilon(network),
      sample=task.sample(config),
    )
  if config.finetune.epochs:
    contract.check_statistics(network, variables or {}, "config.weights")
  if stages:
    contract.check_statistics(network, backbone, "config.backbone")
  loaded = task.load(config, network)
  if loaded.beside is not None and variables is not None:
    loaded = loaded.beside(variables)
  for stage in stages:
    check_training(config, stage, loaded.for_stage(stage).num_train)
  inputs = {"data": loaded.fingerprint(), "backbone": digest(backbone)}
  if variables is not None:
    inputs["weights"] = digest(variables)
  files.claim(inputs)
  return Job(
    config,
    files,
    network,
    template,
    plan,
    variables,
    backbone,
    task,
    loaded,
  )


def digest(variables: PyTree) -> str:
  """Returns the sha256 of the paths and values of variables."""
  return storage.digest_arrays(sorted(trees.flatten(variables).items()))


def count_classes(
  config: ml_collections.ConfigDict,
) -> ml_collections.ConfigDict:
  """Returns the config with the number of classes of its data in place of 0.

  Raises:
    InputError: the data are missing.
  """
  if config.model.get("num_classes") != 0:
    return config
  task: Any = tasks.get(config.task)
  try:
    count = task.count_classes(config)
  except errors.InputError as error:
    raise errors.InputError(
      f"config.model.num_classes is 0, so that the classes of the data are "
      f"counted: {error}"
    ) from error
  counted = config.copy_and_resolve_references()
  counted.model.num_classes = count
  return counted


def check_training(
  config: ml_collections.ConfigDict, stage: str, num_train: int
) -> None:
  """Refuses a training that cannot be run on so many images.

  Args:
    config: the recipe.
    stage: 'train' or 'finetune', which will run.
    num_train: training images.

  Raises:
    InputError: names the setting, its value and those that fit.
  """
  batch_size = config[stage].batch_size
  if batch_size > num_train:
    raise errors.InputError(
      f"config.{stage}.batch_size is {batch_size}, but there are {num_train} "
      f"training images; choose 1 to {num_train}"
    )
  schedule = training.Schedule(
    config[stage], num_train, config.checkpoint_steps
  )
  if schedule.num_steps > settings.MOST:
    raise errors.InputError(
      f"config.{stage}.epochs is {config[stage].epochs}, which are "
      f"{schedule.num_steps} steps; choose at most "
      f"{settings.MOST // schedule.steps_per_epoch}"
    )
  try:
    schedule.make_optimizer()
  except errors.InputError as error:
    raise errors.InputError(f"config.{stage}: {error}") from error


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
  count = jax.device_count() if num_devices is None else num_devices
  distributed.check_batch_size(
    "config.eval_batch_size", config.eval_batch_size, count
  )
  for stage in stages:
    stage_settings = config[stage]
    name = f"config.{stage}.batch_size"
    distributed.check_batch_size(
      name, stage_settings.batch_size, count, stage_settings.microbatches
    )


def build_network(
  config: ml_collections.ConfigDict,
) -> tuple[contract.Network, PyTree]:
  """Returns the network of the config, and its variables as shapes.

  Raises:
    InputError: no such model, settings that it does not take, or a network that
      does not take the inputs of the task or whose norms cannot be folded.
  """
  arguments = dict(config.model)
  name = arguments.pop("name")
  make = models.get_model(name).make
  try:
    inspect.signature(make).bind(**arguments)
  except TypeError as error:
    raise errors.InputError(
      f"model {name!r} does not take the settings of config.model "
      f"{sorted(arguments)}: {error}; take a recipe of this model"
    ) from error
  network = make(**arguments)
  sample = tasks.get(config.task).sample(config)
  try:
    template = jax.eval_shape(network.init, jax.random.key(0), *sample)
  except (TypeError, ValueError) as error:
    inputs = ", ".join(str(jax.typeof(leaf)) for leaf in sample)
    raise errors.InputError(
      f"model {name!r} cannot take the inputs of task {config.task!r}, "
      f"{inputs}: {error}; choose another model or config.task"
    ) from error
  contract.check_norms(name, network, template)
  return network, template


def read_weights(
  config: ml_collections.ConfigDict, network: contract.Network, template: PyTree
) -> PyTree:
  """Reads the variables in `config.weights`, compressed or dense."""
  return weights.read(
    config.weights,
    config.model.name,
    template,
    norm_epsilon=contract.norm_epsilon(network),
  )


def write_packed(
  config: ml_collections.ConfigDict,
  network: contract.Network,
  files: workspace.Workspace,
  variables: PyTree,
) -> pack.PackedModel:
  """Packs the variables into the run's file, which all processes then see."""
  packed = pack.pack_model(
    variables,
    norm_epsilon=contract.norm_epsilon(network),
    architecture=dict(config.model),
    storage=settings.make_storage(config),
  )
  if distributed.is_lead():
    pack.write(files.packed_file, packed)
  distributed.barrier("packed")
  return packed

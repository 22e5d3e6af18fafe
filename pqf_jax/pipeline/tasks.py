"""What differs between networks that classify images and that find objects."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from pqf_jax import cluster, data, errors, finetune, progress
from pqf_jax.tasks import classification

PyTree = Any
Batches = Callable[..., Iterator[finetune.Batch]]


class Task(NamedTuple):
  """One kind of network on its data, as the stages see it.

  Attributes:
    num_train: training images.
    train_batches: (batch_size, seed, start_step, num_steps) -> global batches.
    make_loss: share of distillation -> `finetune.LossFn`.
    make_teacher: dense variables -> the map that adds what they say to a batch.
    evaluate: variables -> {metric: 0..1, images} over all test images.
    metric: the one by which an epoch is the best.
  """

  num_train: int
  train_batches: Batches
  make_loss: Callable[[float], finetune.LossFn]
  make_teacher: Callable[[PyTree], Callable[[Any], Any]]
  evaluate: Callable[[PyTree], dict[str, float]]
  metric: str


def sample(config: ml_collections.ConfigDict) -> tuple[jax.Array, ...]:
  """Inputs of the network's `apply`, small: only their shapes matter."""
  return SAMPLES[config.task]()


def load(config: ml_collections.ConfigDict, module: Any) -> Task:
  """The task on the data of the config.

  Raises:
    InputError: the data are not there, or are none for this network.
  """
  return TASKS[config.task](config, module)


def _classification(config: ml_collections.ConfigDict, module: Any) -> Task:
  dataset = load_images(config)
  preprocess = functools.partial(
    data.normalize, mean=dataset.mean, std=dataset.std
  )
  count = classification.make_evaluate(module.apply, preprocess)

  def evaluate(variables: PyTree) -> dict[str, float]:
    batches = data.eval_batches(
      dataset, batch_size=config.eval_batch_size, **_share()
    )
    return count(cluster.replicate(variables), map(cluster.shard, batches))

  def train_batches(**order: Any) -> Iterator[finetune.Batch]:
    return map(cluster.shard, data.train_batches(dataset, **order, **_share()))

  return Task(
    len(dataset.train),
    train_batches,
    lambda share: classification.make_loss(
      module.apply, preprocess, distillation=share
    ),
    lambda variables: classification.make_teacher(
      module.apply, preprocess, cluster.replicate(variables)
    ),
    evaluate,
    "top1",
  )


def load_images(config: ml_collections.ConfigDict) -> data.ImageDataset:
  """The labelled images of `config.data`, with its mean and deviation."""
  dataset = data.get_dataset(
    config.data.name,
    data_dir=config.data.dir or None,
    image_size=config.data.image_size or None,
  )
  if dataset.num_classes != config.model.num_classes:
    raise errors.InputError(
      f"config.model.num_classes is {config.model.num_classes}, but "
      f"{config.data.name} has {dataset.num_classes} classes"
    )
  for field in ("mean", "std"):
    values = tuple(config.data[field])
    if len(values) not in (0, 3):
      raise errors.InputError(
        f"config.data.{field} is {values}; give one value in 0..1 for each of "
        "red, green and blue, or none for those of the data set"
      )
    if values:
      dataset = dataset._replace(**{field: values})
  return dataset


def _share() -> dict[str, int]:
  return {
    "process_index": jax.process_index(),
    "process_count": jax.process_count(),
  }


def _detection(config: ml_collections.ConfigDict, module: Any) -> Task:
  # pycocotools and its kind are needed by no other network.
  from pqf_jax.data import coco, detection_batches
  from pqf_jax.tasks import detection, detection_metrics

  if config.distillation:
    raise errors.InputError(
      f"config.distillation is {config.distillation:g}; detection has no "
      "teacher, so give 0"
    )
  dataset = coco.load(
    config.data.dir,
    num_classes=config.model.num_classes,
    with_train=config.mode == "compress",
    image_size=config.data.image_size or None,
    num_objects=config.data.num_objects or None,
  )
  for note in dataset.notes:
    progress.say(note)
  run = jax.jit(module.apply)
  # Each process looks at its own images and tells the others what it found.
  alone = jax.process_count() == 1
  place = cluster.shard if alone else dict

  def detect(variables: PyTree, batch: finetune.Batch) -> Any:
    placed = place({name: batch[name] for name in ("image", "size")})
    return run(variables, placed["image"], placed["size"])

  measure = detection_metrics.make_evaluate(
    detect, dataset, gather=cluster.collect
  )

  def evaluate(variables: PyTree) -> dict[str, float]:
    batches = detection_batches.eval_batches(
      dataset, batch_size=config.eval_batch_size, **_share()
    )
    return measure(
      cluster.replicate(variables) if alone else variables, batches
    )

  def train_batches(**order: Any) -> Iterator[finetune.Batch]:
    for batch in detection_batches.train_batches(dataset, **order, **_share()):
      del batch["image_id"]  # int64, which a device has not
      yield cluster.shard(batch)

  forward = functools.partial(module.apply, method="training_outputs")
  return Task(
    len(dataset.train or ()),
    train_batches,
    lambda share: detection.make_loss(forward),
    lambda variables: lambda batch: batch,
    evaluate,
    "mask_ap",
  )


def _noise_image() -> tuple[jax.Array, ...]:
  # Of zeros a detector finds nothing, which no permutation could change.
  pixels = np.random.default_rng(0).integers(0, 256, (1, 96, 128, 3), np.uint8)
  return jnp.asarray(pixels), jnp.array([[96, 128]], jnp.int32)


TASKS = {"classification": _classification, "detection": _detection}
# Convolutional networks take any size; this one suits every stem and is cheap.
SAMPLES = {
  "classification": lambda: (jnp.zeros((1, 64, 64, 3)),),
  "detection": _noise_image,
}

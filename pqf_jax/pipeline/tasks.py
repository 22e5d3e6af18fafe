"""What differs between networks that classify images and that find objects."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from pqf_jax import data, errors, finetune
from pqf_jax.pipeline import training
from pqf_jax.runtime import distributed
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
    pictures: {title: variables} -> PNG files that show what they find, for the
      report.
  """

  num_train: int
  train_batches: Batches
  make_loss: Callable[[float], finetune.LossFn]
  make_teacher: Callable[[PyTree], Callable[[Any], Any]]
  evaluate: Callable[[PyTree], dict[str, float]]
  metric: str
  pictures: Callable[[Mapping[str, PyTree]], list[bytes]]


def sample(config: ml_collections.ConfigDict) -> tuple[jax.Array, ...]:
  """Inputs of the network's `apply`, small: only their shapes matter."""
  return SAMPLES[config.task]()


def load(config: ml_collections.ConfigDict, module: Any) -> Task:
  """The task on the data of the config.

  Raises:
    InputError: the data are not there, or are none for this network; or the
      devices cannot share a batch of the evaluation.
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
      dataset, batch_size=config.eval_batch_size, **distributed.share()
    )
    return count(
      distributed.replicate(variables), map(distributed.shard, batches)
    )

  def train_batches(**order: Any) -> Iterator[finetune.Batch]:
    return map(
      distributed.shard,
      data.train_batches(dataset, **order, **distributed.share()),
    )

  return Task(
    len(dataset.train),
    train_batches,
    lambda share: classification.make_loss(
      trained_classifier(config, module).apply, preprocess, distillation=share
    ),
    lambda variables: classification.make_teacher(
      module.apply, preprocess, distributed.replicate(variables)
    ),
    evaluate,
    "top1",
    lambda networks: [],
  )


def trained_classifier(config: ml_collections.ConfigDict, module: Any) -> Any:
  """`training.trained`, its norms averaging over what the config says.

  Args:
    config: the recipe.
    module: with fields `dtype` and `norm_axis`; see `models.layers`.
  """
  axis = NORM_AXES[config.norm_statistics]
  return training.trained(config, module, norm_axis=axis)


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


def _detection(config: ml_collections.ConfigDict, module: Any) -> Task:
  # pycocotools and its kind are needed by no other network.
  from pqf_jax.pipeline import detection_task

  return Task(**detection_task.load(config, module))


def _noise_image() -> tuple[jax.Array, ...]:
  # Of zeros a detector finds nothing, which no permutation could change.
  pixels = np.random.default_rng(0).integers(0, 256, (1, 96, 128, 3), np.uint8)
  return jnp.asarray(pixels), jnp.array([[96, 128]], jnp.int32)


TASKS = {"classification": _classification, "detection": _detection}
# What `config.dtype` may be; float16 would need its losses scaled.
DTYPES = ("float32", "bfloat16")
# What `config.norm_statistics` may be.
NORM_AXES = {"batch": distributed.AXIS, "device": None}
# Convolutional networks take any size; this one suits every stem and is cheap.
SAMPLES = {
  "classification": lambda: (jnp.zeros((1, 64, 64, 3)),),
  "detection": _noise_image,
}

"""The programs of each task without its data: shapes stand for images."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from pqf_jax import data, finetune
from pqf_jax.pipeline import tasks, training
from pqf_jax.runtime import distributed
from pqf_jax.tasks import classification

PyTree = Any
Shapes = dict[str, jax.ShapeDtypeStruct]
# Side of an image where the config leaves it to the data set: what its loader
# takes, and for COCO its largest image and, of objects, more than any has.
IMAGE_SIDES = {"cifar10": 32, "digits": 32, "coco": 640}
USUAL_SIDE = 224
NUM_OBJECTS = 100


class Rehearsal(NamedTuple):
  """What a task runs, and on arrays of which shape.

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


def _classification(
  config: ml_collections.ConfigDict, module: Any
) -> Rehearsal:
  # Constants of the program: their values cost nothing.
  preprocess = functools.partial(data.normalize, mean=(0.5,) * 3, std=(1,) * 3)
  side = _side(config)

  def batch(size: int, fields: Shapes) -> Shapes:
    image = jax.ShapeDtypeStruct((size, side, side, 3), jnp.uint8)
    label = jax.ShapeDtypeStruct((size,), jnp.int32)
    return {"image": image, "label": label} | fields

  def train_batch(size: int) -> Shapes:
    if not config.distillation:
      return batch(size, {})
    shape = size, config.model.num_classes
    taught = jax.ShapeDtypeStruct(shape, jnp.float32)
    return batch(size, {"teacher_logits": taught})

  def eval_batch(size: int) -> Shapes:
    return batch(size, {"mask": jax.ShapeDtypeStruct((size,), jnp.float32)})

  return Rehearsal(
    classification.make_loss(
      tasks.trained_classifier(config, module).apply,
      preprocess,
      distillation=config.distillation,
    ),
    train_batch,
    classification.make_count(module.apply, preprocess),
    eval_batch,
  )


def _detection(config: ml_collections.ConfigDict, module: Any) -> Rehearsal:
  # Its own dependencies are needed by no other network.
  from pqf_jax.tasks import detection

  side = _side(config)
  objects = config.data.num_objects or NUM_OBJECTS

  def eval_batch(size: int) -> Shapes:
    return {
      "image": jax.ShapeDtypeStruct((size, side, side, 3), jnp.uint8),
      "size": jax.ShapeDtypeStruct((size, 2), jnp.int32),
    }

  def train_batch(size: int) -> Shapes:
    rows = size, objects
    return eval_batch(size) | {
      "boxes": jax.ShapeDtypeStruct((*rows, 4), jnp.float32),
      "labels": jax.ShapeDtypeStruct(rows, jnp.int32),
      "valid": jax.ShapeDtypeStruct(rows, jnp.bool_),
      "masks": jax.ShapeDtypeStruct((*rows, side, -(-side // 8)), jnp.uint8),
    }

  forward = functools.partial(
    training.trained(config, module).apply, method="training_outputs"
  )
  return Rehearsal(
    detection.make_loss(forward, axis=distributed.AXIS),
    train_batch,
    lambda variables, batch: module.apply(
      variables, batch["image"], batch["size"]
    ),
    eval_batch,
  )


def _side(config: ml_collections.ConfigDict) -> int:
  usual = IMAGE_SIDES.get(config.data.name, USUAL_SIDE)
  return config.data.image_size or usual


REHEARSALS = {"classification": _classification, "detection": _detection}

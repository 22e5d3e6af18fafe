"""The five losses of Mask R-CNN, as torchvision's.

Each is normalized over the whole batch, so that an image weighs by the number
of its samples (arXiv 1506.01497, equation 1, and 1703.06870, section 3).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import lax

from pqf_jax import finetune

PyTree = Any
Batch = Mapping[str, jax.Array]
# Where the smooth L1 loss of boxes turns from square to linear.
SMOOTH_BELOW = 1 / 9


class _Anchors(Protocol):
  logits: jax.Array
  positive: jax.Array
  valid: jax.Array
  offsets: jax.Array
  targets: jax.Array


class _Boxes(Protocol):
  labels: jax.Array
  positive: jax.Array
  valid: jax.Array
  targets: jax.Array


class Outputs(Protocol):
  """Outputs of a model for sampled anchors and boxes, with their targets.

  Attributes:
    anchors: `logits`, `positive`, `valid` [B, N]; `offsets`, `targets`
      [B, N, 4].
    boxes: `labels`, `positive`, `valid` [B, R]; `targets` [B, R, 4].
    class_logits: [B, R, num_classes].
    box_offsets: [B, R, 4].
    mask_logits: [B, M, P, P].
    mask_targets: [B, M, P, P], from 0 to 1.
    mask_valid: bool [B, M].
  """

  anchors: _Anchors
  boxes: _Boxes
  class_logits: jax.Array
  box_offsets: jax.Array
  mask_logits: jax.Array
  mask_targets: jax.Array
  mask_valid: jax.Array


ForwardFn = Callable[[PyTree, Batch, jax.Array], Outputs]
"""(variables, batch, key) -> outputs; samples are drawn with the key."""


def make_loss(
  forward_fn: ForwardFn, *, axis: str | None = None
) -> finetune.LossFn:
  """Builds the sum of the five losses, with norms in evaluation mode.

  Args:
    forward_fn: such as `functools.partial(model.apply,
      method="training_outputs")` of `models.mask_rcnn`.
    axis: along which devices share the batch, under a `shard_map`: the mean of
      their losses is that of the whole batch. None: they do not share it.

  Returns:
    A `finetune.LossFn` over batches as the model's method takes them. It also
    reports each of the losses.
  """

  def loss_fn(
    variables: PyTree, batch: Batch, key: jax.Array
  ) -> tuple[jax.Array, tuple[PyTree, finetune.Metrics]]:
    losses = compute_losses(forward_fn(variables, batch, key), axis=axis)
    total = functools.reduce(jnp.add, losses.values())
    return total, ({}, losses)

  return loss_fn


def compute_losses(
  outputs: Outputs, *, axis: str | None = None
) -> dict[str, jax.Array]:
  """Returns {torchvision's name: loss}; 0 where nothing was sampled."""
  mean = functools.partial(_mean, axis=axis)
  anchors, boxes = outputs.anchors, outputs.boxes
  objectness = optax.sigmoid_binary_cross_entropy(
    anchors.logits, anchors.positive.astype(anchors.logits.dtype)
  )
  classes = optax.softmax_cross_entropy_with_integer_labels(
    outputs.class_logits, boxes.labels
  )
  masks = optax.sigmoid_binary_cross_entropy(
    outputs.mask_logits, outputs.mask_targets
  )
  return {
    "loss_objectness": mean(objectness, anchors.valid, anchors.valid),
    "loss_rpn_box_reg": mean(
      _smooth_l1(anchors.offsets - anchors.targets),
      anchors.positive,
      anchors.valid,
    ),
    "loss_classifier": mean(classes, boxes.valid, boxes.valid),
    "loss_box_reg": mean(
      _smooth_l1(outputs.box_offsets - boxes.targets),
      boxes.positive,
      boxes.valid,
    ),
    "loss_mask": mean(
      masks.mean((2, 3)), outputs.mask_valid, outputs.mask_valid
    ),
  }


def _smooth_l1(errors: jax.Array) -> jax.Array:
  """Returns the sum over the four offsets: [..., 4] -> [...]."""
  size = jnp.abs(errors)
  square = 0.5 * jnp.square(errors) / SMOOTH_BELOW
  linear = size - 0.5 * SMOOTH_BELOW
  return jnp.where(size < SMOOTH_BELOW, square, linear).sum(-1)


def _mean(
  values: jax.Array, mask: jax.Array, counted: jax.Array, *, axis: str | None
) -> jax.Array:
  """Returns the sum of the values in `mask` over the number of `counted`.

  With an axis the number is the average over devices, so that the mean over
  devices is the sum of all values over the number of all.
  """
  total = jnp.where(mask, values, 0).sum()
  count = counted.sum().astype(total.dtype)
  if axis is not None:
    count = lax.pmean(count, axis)
  return total / jnp.where(count > 0, count, 1)

"""Axis-aligned boxes (x1, y1, x2, y2), their overlaps and regression offsets.

Coordinates are continuous: a box is x2 - x1 wide, with no + 1. All functions
accept any leading axes. The parametrization is that of R-CNN (appendix C of
arXiv 1311.2524) with torchvision's weights and bound.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

# Log of the largest growth of a side, 1000 / 16 as in Fast R-CNN.
MAX_LOG_SCALE = math.log(1000 / 16)
UNIT = (1.0, 1.0, 1.0, 1.0)


def area(boxes: jax.Array) -> jax.Array:
  """Returns the areas [...] of boxes [..., 4]."""
  return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def iou_matrix(first: jax.Array, second: jax.Array) -> jax.Array:
  """Computes the intersection over union of all pairs.

  Args:
    first: [..., N, 4].
    second: [..., M, 4].

  Returns:
    [..., N, M]; 0, not NaN, where both boxes are empty.
  """
  one, other = first[..., :, None, :], second[..., None, :, :]
  low = jnp.maximum(one[..., :2], other[..., :2])
  high = jnp.minimum(one[..., 2:], other[..., 2:])
  sides = jnp.maximum(high - low, 0)
  common = sides[..., 0] * sides[..., 1]
  union = area(one) + area(other) - common
  return jnp.where(union > 0, common / jnp.where(union > 0, union, 1), 0)


def clip(boxes: jax.Array, height: jax.Array, width: jax.Array) -> jax.Array:
  """Clips boxes [..., 4] to an image whose sides have the same type."""
  high = jnp.stack([width, height, width, height], axis=-1)
  high = jnp.broadcast_to(high, boxes.shape)
  return jnp.minimum(jnp.maximum(boxes, 0), high)


def is_large(boxes: jax.Array, min_side: float) -> jax.Array:
  """Returns whether both sides of boxes [..., 4] are at least `min_side`."""
  return (boxes[..., 2:] - boxes[..., :2] >= min_side).all(-1)


def decode(
  offsets: jax.Array, boxes: jax.Array, *, weights: Sequence[float] = UNIT
) -> jax.Array:
  """Moves and scales boxes by predicted offsets.

  Args:
    offsets: [..., 4] (dx, dy, dw, dh): the shift of the center in sides of the
      box, and the log of the growth of the sides, times `weights`.
    boxes: [..., 4], with leading axes that broadcast.
    weights: scales of the network's outputs.

  Returns:
    Boxes [..., 4].
  """
  width, height, x, y = _centered(boxes)
  dx, dy = offsets[..., 0] / weights[0], offsets[..., 1] / weights[1]
  dw = jnp.minimum(offsets[..., 2] / weights[2], MAX_LOG_SCALE)
  dh = jnp.minimum(offsets[..., 3] / weights[3], MAX_LOG_SCALE)
  x, y = dx * width + x, dy * height + y
  half_w, half_h = 0.5 * jnp.exp(dw) * width, 0.5 * jnp.exp(dh) * height
  corners = [x - half_w, y - half_h, x + half_w, y + half_h]
  return jnp.stack(corners, axis=-1)


def encode(
  targets: jax.Array, boxes: jax.Array, *, weights: Sequence[float] = UNIT
) -> jax.Array:
  """Computes the offsets from boxes to targets; undoes `decode`.

  Args:
    targets: [..., 4].
    boxes: [..., 4].
    weights: see `decode`.

  Returns:
    Offsets [..., 4]; finite but meaningless where a box or a target is empty,
    as padding is.
  """
  width, height, x, y = _centered(boxes)
  target_w, target_h, target_x, target_y = _centered(targets)
  width, height = _positive(width), _positive(height)
  target_w, target_h = _positive(target_w), _positive(target_h)
  offsets = [
    weights[0] * (target_x - x) / width,
    weights[1] * (target_y - y) / height,
    weights[2] * jnp.log(target_w / width),
    weights[3] * jnp.log(target_h / height),
  ]
  return jnp.stack(offsets, axis=-1)


def _centered(boxes: jax.Array) -> tuple[jax.Array, ...]:
  """Returns (width, height, x and y of the center)."""
  width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
  x, y = boxes[..., 0] + 0.5 * width, boxes[..., 1] + 0.5 * height
  return width, height, x, y


def _positive(sides: jax.Array) -> jax.Array:
  return jnp.where(sides > 0, sides, 1)

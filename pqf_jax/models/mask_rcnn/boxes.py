"""Axis-aligned boxes (x1, y1, x2, y2), their overlaps, and offsets from others.

Coordinates are continuous: a box is x2 - x1 wide, with no + 1. All functions
take any leading axes. The parametrization is that of R-CNN (appendix C of
arXiv 1311.2524) with torchvision's weights and bound.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

# What exp() may enlarge a side by; from the 1000 / 16 of Fast R-CNN.
MAX_LOG_SCALE = math.log(1000 / 16)
UNIT = (1.0, 1.0, 1.0, 1.0)


def area(boxes: jax.Array) -> jax.Array:
  """Boxes [..., 4] -> areas [...]."""
  return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def iou_matrix(first: jax.Array, second: jax.Array) -> jax.Array:
  """Intersection over union of all pairs.

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
  """Cuts boxes [..., 4] at the border of an image; sizes are of their type."""
  high = jnp.stack([width, height, width, height], axis=-1)
  high = jnp.broadcast_to(high, boxes.shape)
  return jnp.minimum(jnp.maximum(boxes, 0), high)


def has_sides(boxes: jax.Array, least: float) -> jax.Array:
  """[..., 4] -> bool [...]: whether no side is shorter than `least`."""
  width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
  return (width >= least) & (height >= least)


def decode(
  offsets: jax.Array, boxes: jax.Array, *, weights: Sequence[float] = UNIT
) -> jax.Array:
  """Moves boxes by what a network says.

  Args:
    offsets: [..., 4] (dx, dy, dw, dh): the shift of the center in sides of the
      box, and the log of the growth of the sides, times `weights`.
    boxes: [..., 4], of leading axes that broadcast.
    weights: what the network's outputs are scaled by.

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
  """The offsets that `decode` makes these targets of.

  Args:
    targets: [..., 4].
    boxes: [..., 4].
    weights: see `decode`.

  Returns:
    Offsets [..., 4]; finite also where a box or a target is empty, as padding
    is, but then without meaning.
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
  """(width, height, x and y of the center)."""
  width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
  return (
    width,
    height,
    boxes[..., 0] + 0.5 * width,
    boxes[..., 1] + 0.5 * height,
  )


def _positive(sides: jax.Array) -> jax.Array:
  return jnp.where(sides > 0, sides, 1)

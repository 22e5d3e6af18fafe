"""Anchors of region proposal networks (arXiv 1506.01497), as in torchvision."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class AnchorGrid(NamedTuple):
  """The anchors of one map, row by row; those of a position are adjacent.

  Attributes:
    boxes: [H * W * A, 4] in pixels of the network's input.
    exists: bool [H * W * A], whether the image covers the position.
  """

  boxes: jax.Array
  exists: jax.Array


def base_anchors(sizes: Sequence[float], ratios: Sequence[float]) -> np.ndarray:
  """Returns anchors around the origin, rounded to whole pixels.

  Args:
    sizes: square roots of the areas.
    ratios: heights over widths.

  Returns:
    float32 [A, 4], one per ratio and size; sizes change fastest.
  """
  # Float32 throughout: the rounding at the end depends on it.
  root = np.sqrt(np.asarray(ratios, np.float32))[:, None]
  side = np.asarray(sizes, np.float32)[None, :]
  width, height = (np.float32(1) / root * side).ravel(), (root * side).ravel()
  return np.round(np.stack([-width, -height, width, height], axis=1) / 2)


def anchor_grid(
  base: np.ndarray,
  shape: Sequence[int],
  grid: jax.Array,
  size: jax.Array,
  *,
  dtype: np.dtype,
) -> AnchorGrid:
  """Places anchors at every position of a map.

  Args:
    base: [A, 4] around the origin.
    shape: height and width of the map (static).
    grid: int [2], how much of it belongs to the image.
    size: int [2], height and width of the image in the network's input, a
      multiple of 32.
    dtype: of the boxes.
  """
  # Whole pixels, as in torchvision: 61 for a map of 13 positions of 800 pixels.
  step = size // grid
  rows, columns = jnp.arange(shape[0]), jnp.arange(shape[1])
  y, x = jnp.meshgrid(rows * step[0], columns * step[1], indexing="ij")
  shift = jnp.stack([x, y, x, y], axis=-1).reshape(-1, 1, 4).astype(dtype)
  inside = (rows < grid[0])[:, None] & (columns < grid[1])[None, :]
  return AnchorGrid(
    (shift + jnp.asarray(base, dtype)[None]).reshape(-1, 4),
    jnp.repeat(inside.ravel(), len(base)),
  )

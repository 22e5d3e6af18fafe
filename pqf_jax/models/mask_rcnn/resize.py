"""Scaling images to the size that a detector works at.

As in torchvision, the short side becomes `min_size` unless the long one would
then exceed `max_size`; interpolation is bilinear between pixel centers, without
antialiasing. The sizes of the images are values, not shapes, so one compiled
program serves all.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = Any
"""A NumPy or JAX array."""


@functools.lru_cache(maxsize=8)
def scaled_lengths(longest: int, min_size: int, max_size: int) -> np.ndarray:
  """Returns a table of the scaled sides of images of every size.

  A side is floor(side * scale) in double precision, which accelerators lack,
  and whose rounding decides: a square of 161 becomes 799, not 800.

  Args:
    longest: side of the largest image.
    min_size: target length of the short side.
    max_size: bound of the long side.

  Returns:
    int32 [longest + 1, longest + 1]: entry [a, b] is the new length of side a
    of an image of sides a and b; at least 1.
  """
  sides = np.maximum(np.arange(longest + 1, dtype=np.float64), 1)
  side, other = sides[:, None], sides[None, :]
  scale = np.minimum(
    min_size / np.minimum(side, other), max_size / np.maximum(side, other)
  )
  lengths = np.maximum(np.floor(side * scale), 1).astype(np.int32)
  lengths.flags.writeable = False
  return lengths


def scaled_sizes(
  sizes: jax.Array, longest: int, min_size: int, max_size: int
) -> jax.Array:
  """Maps (height, width) int32 [B, 2] of images to those after scaling."""
  table = jnp.asarray(scaled_lengths(longest, min_size, max_size))
  height, width = sizes[:, 0], sizes[:, 1]
  return jnp.stack([table[height, width], table[width, height]], axis=1)


def resize_image(
  image: jax.Array,
  size: jax.Array,
  scaled: jax.Array,
  *,
  canvas: tuple[int, int],
) -> jax.Array:
  """Scales one image from its buffer into another one.

  Args:
    image: [S, T, C] float, the image at its top left.
    size: int [2], height and width of the image.
    scaled: int [2], the same after scaling; pixels beyond the canvas are lost.
    canvas: height and width of the result.

  Returns:
    [*canvas, C], zero outside of the image.
  """
  for axis in (0, 1):
    positions = jnp.arange(canvas[axis])
    low, high, above = bilinear_sources(
      positions, size[axis], scaled[axis], image.dtype
    )
    above = above.reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
    lower, upper = (jnp.take(image, i, axis, mode="clip") for i in (low, high))
    image = lower * (1 - above) + upper * above
  rows = jnp.arange(canvas[0])[:, None, None] < scaled[0]
  columns = jnp.arange(canvas[1])[None, :, None] < scaled[1]
  return jnp.where(rows & columns, image, 0)


def nearest_source(
  positions: jax.Array, length: jax.Array, scaled: jax.Array
) -> jax.Array:
  """Returns the positions that torch's nearest interpolation reads.

  Args:
    positions: int, after scaling.
    length: int [], of the original.
    scaled: int [], after scaling.

  Returns:
    int32 of the shape of `positions`. The product is float32 on purpose:
    another precision returns other positions.
  """
  ratio = length.astype(jnp.float32) / scaled.astype(jnp.float32)
  source = jnp.floor(positions.astype(jnp.float32) * ratio).astype(jnp.int32)
  return jnp.clip(source, 0, length - 1)


def bilinear_sources(
  positions: Array, length: Array | int, scaled: Array, dtype: np.dtype
) -> tuple[Array, Array, Array]:
  """Returns the two positions that bilinear interpolation reads, with weights.

  Args:
    positions: int, after scaling; NumPy or JAX.
    length: of the original.
    scaled: int, after scaling.
    dtype: of the weights.

  Returns:
    (the one before int32, the one behind int32, weight of the latter).
  """
  numpy = positions.__array_namespace__()
  ratio = numpy.asarray(length, dtype) / numpy.maximum(scaled, 1).astype(dtype)
  source = numpy.maximum((positions.astype(dtype) + 0.5) * ratio - 0.5, 0)
  low = numpy.minimum(source.astype(np.int32), length - 1)
  return low, numpy.minimum(low + 1, length - 1), source - low.astype(dtype)

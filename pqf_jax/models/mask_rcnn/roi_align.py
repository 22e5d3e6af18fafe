"""ROIAlign (section 3 of arXiv 1703.06870) over a pyramid of maps.

The value of a bin is the mean of 2 x 2 samples, each bilinear between four
positions of the map, as in torchvision with sampling_ratio=2 and aligned=False.
Rows and columns separate: a bin is a weighted sum of 4 rows and 4 columns.
Boxes get no gradient.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

NUM_SAMPLES = 2
# A box of 224 x 224 reads the third map, of stride 16 (equation 1 of
# arXiv 1612.03144); torchvision adds the small number.
CANONICAL_SIZE = 224
CANONICAL_LEVEL = 2
LEVEL_EPSILON = 1e-6
FIRST_STRIDE = 4


_Taps = tuple[jax.Array, jax.Array]
"""The rows (or columns) that each of P bins is a weighted sum of.

Indices int32 [R, P, 4] and weights [R, P, 4]; the weights of a bin have the sum
1, or less if samples are outside of the map.
"""


def roi_align(
  maps: Sequence[jax.Array], boxes: jax.Array, size: jax.Array, *, num_bins: int
) -> jax.Array:
  """Pools boxes of one image, each from the map that suits its size.

  TPUs use `pool_by_product`, other platforms `pool_by_gather`.

  Args:
    maps: of strides 4, 8, 16, ...: [H, W, C] each.
    boxes: [R, 4] in pixels of the network's input.
    size: int [2], height and width of the image in the network's input, a
      multiple of the strides. Maps may be larger; only this part is read.
    num_bins: P, bins along each side.

  Returns:
    [R, P, P, C].
  """
  boxes = lax.stop_gradient(boxes)

  def pool(*arguments: Any) -> jax.Array:
    return lax.platform_dependent(
      *arguments,
      tpu=functools.partial(pool_by_product, num_bins=num_bins),
      default=functools.partial(pool_by_gather, num_bins=num_bins),
    )

  # The backward pass needs only the boxes; without `checkpoint` it would keep
  # the indices, weights and samples of the forward pass.
  compute: Callable[..., jax.Array] = jax.checkpoint(pool)
  return compute(tuple(maps), boxes, size)


def pool_by_gather(
  maps: Sequence[jax.Array], boxes: jax.Array, size: jax.Array, *, num_bins: int
) -> jax.Array:
  """Computes `roi_align` by reading the 16 positions of each bin."""
  level = assign_levels(boxes, len(maps))
  lengths = [x.shape[0] * x.shape[1] for x in maps]
  table = jnp.concatenate([x.reshape(-1, x.shape[2]) for x in maps])

  def of_level(values: Sequence[int]) -> jax.Array:
    return jnp.asarray(values, jnp.int32)[level]

  first = of_level([sum(lengths[:i]) for i in range(len(maps))])
  row_length = of_level([x.shape[1] for x in maps])
  stride = of_level([FIRST_STRIDE * 2**i for i in range(len(maps))])
  row, by_row = _taps(boxes[:, 1::2], size[0], stride, num_bins)
  column, by_column = _taps(boxes[:, 0::2], size[1], stride, num_bins)
  base = first[:, None, None] + row * row_length[:, None, None]
  indices = base[:, :, None, :, None] + column[:, None, :, None, :]
  weights = by_row[:, :, None, :, None] * by_column[:, None, :, None, :]
  # The taps never leave the table; 'clip' saves the check.
  samples = jnp.take(table, indices, axis=0, mode="clip")
  return (samples * weights[..., None].astype(table.dtype)).sum((3, 4))


def pool_by_product(
  maps: Sequence[jax.Array], boxes: jax.Array, size: jax.Array, *, num_bins: int
) -> jax.Array:
  """Computes `roi_align` by matrix products of every box with every map.

  On an H100 this is ten times slower than the gather; but the gradient of a
  gather is a scatter, which is slow on TPUs.
  """
  level = assign_levels(boxes, len(maps))
  pooled = []
  for i, x in enumerate(maps):
    stride = jnp.full(level.shape, FIRST_STRIDE * 2**i, jnp.int32)
    rows = _taps(boxes[:, 1::2], size[0], stride, num_bins)
    columns = _taps(boxes[:, 0::2], size[1], stride, num_bins)
    here = (level == i)[:, None, None]
    by_row = _matrix(rows, x.shape[0]) * here.astype(boxes.dtype)
    by_column = _matrix(columns, x.shape[1])
    pooled.append(
      jnp.einsum(
        "rph,hwc,rqw->rpqc",
        by_row.astype(x.dtype),
        x,
        by_column.astype(x.dtype),
        precision=lax.Precision.HIGHEST,
      )
    )
  return functools.reduce(jnp.add, pooled)


def assign_levels(boxes: jax.Array, num_levels: int) -> jax.Array:
  """Returns the number of the map that each box [R, 4] reads, int32 [R]."""
  sides = jnp.maximum(boxes[:, 2:] - boxes[:, :2], 0)
  scale = jnp.sqrt(sides[:, 0] * sides[:, 1]) / CANONICAL_SIZE
  # Empty boxes, such as padding, read the finest map.
  level = jnp.log2(jnp.where(scale > 0, scale, 2.0**-num_levels))
  level = jnp.floor(CANONICAL_LEVEL + level + LEVEL_EPSILON)
  return jnp.clip(level, 0, num_levels - 1).astype(jnp.int32)


def neighbours(
  position: jax.Array, length: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Finds the two rows that torchvision's RoIAlign reads; shapes broadcast.

  Args:
    position: in rows, float.
    length: int, number of rows.

  Returns:
    (bool: positions more than a row beyond either end read nothing; the row
    before int32; the row behind int32, at the end both are the last row; the
    weight of the latter, that of the former is the rest to 1).
  """
  inside = (position >= -1) & (position <= length.astype(position.dtype))
  position = jnp.maximum(position, 0)
  low = jnp.floor(position).astype(jnp.int32)
  at_end = low >= length - 1
  low = jnp.where(at_end, length - 1, low)
  high = jnp.where(at_end, low, low + 1)
  above = jnp.where(at_end, 0, position - low.astype(position.dtype))
  return inside, low, high, above


def _taps(
  ends: jax.Array, length: jax.Array, stride: jax.Array, num_bins: int
) -> _Taps:
  """Computes the taps of boxes [ends[:, 0], ends[:, 1]] in a strided map."""
  ends = ends / stride[:, None].astype(ends.dtype)
  length = (length.astype(jnp.int32) // stride)[:, None]
  start, side = ends[:, :1], jnp.maximum(ends[:, 1:] - ends[:, :1], 1)
  sample = jnp.arange(num_bins * NUM_SAMPLES)[None]
  place, within = (
    part.astype(ends.dtype)
    for part in (sample // NUM_SAMPLES, sample % NUM_SAMPLES)
  )
  step = side / num_bins
  position = start + place * step + (within + 0.5) * step / NUM_SAMPLES
  inside, low, high, above = neighbours(position, length)
  # Samples outside may have any position: they read some row with weight 0.
  above = jnp.where(inside, above, 0)
  below = jnp.where(inside, 1 - above, 0)
  bins = (ends.shape[0], num_bins, NUM_SAMPLES)
  indices = [part.reshape(bins) for part in (low, high)]
  weights = [part.reshape(bins) / NUM_SAMPLES for part in (below, above)]
  return jnp.concatenate(indices, -1), jnp.concatenate(weights, -1)


def _matrix(taps: _Taps, length: int) -> jax.Array:
  """Returns [R, P, length], the weight of every position in every bin."""
  position = jnp.arange(length, dtype=jnp.int32).reshape(1, 1, 1, -1)
  indices, weights = (part[..., None] for part in taps)
  return jnp.where(indices == position, weights, 0).sum(axis=2)

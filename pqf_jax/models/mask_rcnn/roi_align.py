"""ROIAlign (section 3 of arXiv 1703.06870) over a pyramid of maps.

The value of a bin is the mean of 2 x 2 samples, each bilinear between four
positions of the map, as torchvision's with sampling_ratio=2 and aligned=False.
Rows and columns separate: a bin is a weighted sum of 4 rows and 4 columns.
Boxes get no gradient.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

NUM_SAMPLES = 2
# A box of 224 x 224 reads the third map, of stride 16 (equation 1 of
# arXiv 1612.03144); the small number is torchvision's.
CANONICAL_SIZE = 224
CANONICAL_LEVEL = 2
LEVEL_EPSILON = 1e-6
FIRST_STRIDE = 4


class _Taps(NamedTuple):
  """The rows (or columns) that each of P bins is a weighted sum of.

  Attributes:
    index: int32 [R, P, 4].
    weight: [R, P, 4], of sum 1, or less where samples are outside of the map.
  """

  index: jax.Array
  weight: jax.Array


def roi_align(
  maps: Sequence[jax.Array],
  boxes: jax.Array,
  size: jax.Array,
  *,
  num_bins: int,
) -> jax.Array:
  """Pools boxes of one image, each from the map that suits its size.

  On TPUs by `pool_by_product`, elsewhere by `pool_by_gather`.

  Args:
    maps: of strides 4, 8, 16, ...: [H, W, C] each.
    boxes: [R, 4] in pixels of the network's input.
    size: int [2], height and width of the image in the network's input, a
      multiple of the strides. Maps may be larger; the rest is not read.
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

  # The backward pass needs boxes alone; without this the indices, weights and
  # samples of the forward pass would be kept for it.
  compute: Callable[..., jax.Array] = jax.checkpoint(pool)
  return compute(tuple(maps), boxes, size)


def pool_by_gather(
  maps: Sequence[jax.Array],
  boxes: jax.Array,
  size: jax.Array,
  *,
  num_bins: int,
) -> jax.Array:
  """`roi_align` that reads the 16 positions of each bin from memory."""
  level = assign_levels(boxes, len(maps))
  lengths = [x.shape[0] * x.shape[1] for x in maps]
  table = jnp.concatenate([x.reshape(-1, x.shape[2]) for x in maps])

  def of_level(values: Sequence[int]) -> jax.Array:
    return jnp.asarray(values, jnp.int32)[level]

  first = of_level([sum(lengths[:i]) for i in range(len(maps))])
  row_length = of_level([x.shape[1] for x in maps])
  stride = of_level([FIRST_STRIDE * 2**i for i in range(len(maps))])
  rows = _taps(boxes[:, 1::2], size[0], stride, num_bins)
  columns = _taps(boxes[:, 0::2], size[1], stride, num_bins)
  base = first[:, None, None] + rows.index * row_length[:, None, None]
  index = base[:, :, None, :, None] + columns.index[:, None, :, None, :]
  weight = (
    rows.weight[:, :, None, :, None] * columns.weight[:, None, :, None, :]
  )
  # The taps never leave the table; 'clip' spares the check.
  samples = jnp.take(table, index, axis=0, mode="clip")
  return (samples * weight[..., None].astype(table.dtype)).sum((3, 4))


def pool_by_product(
  maps: Sequence[jax.Array],
  boxes: jax.Array,
  size: jax.Array,
  *,
  num_bins: int,
) -> jax.Array:
  """`roi_align` by matrix products, every box with every map.

  On an H100 ten times slower than the gather, whose gradient is a scatter,
  which is what TPUs are slow at.
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
  return sum(pooled)


def assign_levels(boxes: jax.Array, num_levels: int) -> jax.Array:
  """Boxes [R, 4] -> int32 [R], the number of the map that each one reads."""
  sides = jnp.maximum(boxes[:, 2:] - boxes[:, :2], 0)
  scale = jnp.sqrt(sides[:, 0] * sides[:, 1]) / CANONICAL_SIZE
  # Empty boxes, such as padding, read the finest map.
  level = jnp.log2(jnp.where(scale > 0, scale, 2.0**-num_levels))
  level = jnp.floor(CANONICAL_LEVEL + level + LEVEL_EPSILON)
  return jnp.clip(level, 0, num_levels - 1).astype(jnp.int32)


class Neighbours(NamedTuple):
  """The two rows that bilinear interpolation reads at each position.

  Attributes:
    inside: bool, False more than a row beyond either end; such read nothing.
    low: int32, the row before.
    high: int32, the row behind; both are the last one at its end.
    above: weight of `high`; that of `low` is the rest to 1.
  """

  inside: jax.Array
  low: jax.Array
  high: jax.Array
  above: jax.Array


def neighbours(position: jax.Array, length: jax.Array) -> Neighbours:
  """What torchvision's RoIAlign reads; shapes broadcast.

  Args:
    position: in rows, float.
    length: int, number of rows.
  """
  inside = (position >= -1) & (position <= length.astype(position.dtype))
  position = jnp.maximum(position, 0)
  low = jnp.floor(position).astype(jnp.int32)
  at_end = low >= length - 1
  low = jnp.where(at_end, length - 1, low)
  high = jnp.where(at_end, low, low + 1)
  above = jnp.where(at_end, 0, position - low.astype(position.dtype))
  return Neighbours(inside, low, high, above)


def _taps(
  ends: jax.Array, length: jax.Array, stride: jax.Array, num_bins: int
) -> _Taps:
  """Of boxes from ends[:, 0] to ends[:, 1], in a map of length / stride."""
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
  # Samples outside may have any position: they read somewhere and weigh 0.
  above = jnp.where(inside, above, 0)
  below = jnp.where(inside, 1 - above, 0)
  bins = (ends.shape[0], num_bins, NUM_SAMPLES)
  index = [part.reshape(bins) for part in (low, high)]
  weight = [part.reshape(bins) / NUM_SAMPLES for part in (below, above)]
  return _Taps(jnp.concatenate(index, -1), jnp.concatenate(weight, -1))


def _matrix(taps: _Taps, length: int) -> jax.Array:
  """[R, P, length] of which a bin's row holds its weights."""
  position = jnp.arange(length, dtype=jnp.int32).reshape(1, 1, 1, -1)
  at = taps.index[..., None] == position
  return jnp.where(at, taps.weight[..., None], 0).sum(axis=2)

"""Instance masks: cut out for training, pasted into the image for evaluation.

A network's mask is a small square that covers a box. Masks of images are
packed, eight pixels a byte, first pixel in the highest bit (`np.packbits`).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pqf_jax.ops import resize, roi_align

# Boxes whose masks are unpacked at a time: 16 of 640 x 640 are 26 MB.
NUM_UNPACKED = 16
THRESHOLD = 0.5


def crop_masks(
  packed: jax.Array,
  objects: jax.Array,
  boxes: jax.Array,
  size: jax.Array,
  scaled: jax.Array,
  *,
  num_bins: int,
  longest: int,
) -> jax.Array:
  """What a network should say about the masks of the given boxes.

  ROIAlign of the scaled mask, each bin the mean of as many bilinear samples as
  it has pixels, rounded up, along each side; the values are not rounded to 0
  and 1. The scaling (nearest) is part of the sampling: the large masks are
  never made.

  Args:
    packed: uint8 [G, S, ceil(T / 8)], masks of the objects of an image, in
      original pixels.
    objects: int [R], the object of each box.
    boxes: [R, 4], in scaled pixels.
    size: int [2], height and width of the original image.
    scaled: int [2], the same after scaling.
    num_bins: P, bins along each side.
    longest: bound of the sides of boxes, in scaled pixels (static).

  Returns:
    [R, P, P] of the boxes' type, from 0 to 1.
  """
  lengths = packed.shape[1], 8 * packed.shape[2]
  settings = {"num_bins": num_bins, "num_samples": -(-longest // num_bins) + 1}
  rows = _averages(boxes[:, 1::2], size[0], scaled[0], lengths[0], **settings)
  columns = _averages(
    boxes[:, 0::2], size[1], scaled[1], lengths[1], **settings
  )

  def crop(
    arguments: tuple[jax.Array, jax.Array, jax.Array],
  ) -> jax.Array:
    index, row, column = arguments
    mask = jnp.unpackbits(packed[index], axis=-1).astype(boxes.dtype)
    return jnp.einsum(
      "ph,hw,qw->pq", row, mask, column, precision=lax.Precision.HIGHEST
    )

  return lax.map(crop, (objects, rows, columns), batch_size=NUM_UNPACKED)


def _averages(
  ends: jax.Array,
  length: jax.Array,
  scaled: jax.Array,
  buffer: int,
  *,
  num_bins: int,
  num_samples: int,
) -> jax.Array:
  """[R, P, buffer]: the weight that each original row has in each bin."""
  start = ends[:, 0, None, None]
  side = jnp.maximum(ends[:, 1, None, None] - start, 1)
  step = side / num_bins
  count = jnp.ceil(step)
  sample = jnp.arange(num_samples)[None, None].astype(ends.dtype)
  place = jnp.arange(num_bins)[None, :, None].astype(ends.dtype)
  position = start + place * step + (sample + 0.5) * step / count
  inside, low, high, above = roi_align.neighbours(position, scaled)
  share = jnp.where(inside & (sample < count), 1 / count, 0)
  row = jnp.arange(ends.shape[0])[:, None, None]
  column = jnp.arange(num_bins)[None, :, None]
  matrix = jnp.zeros((ends.shape[0], num_bins, buffer), ends.dtype)
  for index, weight in ((low, (1 - above) * share), (high, above * share)):
    index = resize.nearest_source(index, length, scaled)
    matrix = matrix.at[row, column, index].add(weight)
  return matrix


def paste_masks(
  masks: np.ndarray,
  boxes: np.ndarray,
  height: int,
  width: int,
  *,
  threshold: float = THRESHOLD,
) -> np.ndarray:
  """Puts masks into their boxes, on the host; equal to torchvision's.

  Args:
    masks: [N, P, P] probabilities.
    boxes: [N, 4] in pixels of the image.
    height: of the image.
    width: of the image.
    threshold: what a probability must exceed.

  Returns:
    bool [N, height, width].
  """
  masks, boxes = np.asarray(masks), np.asarray(boxes)
  pasted = np.zeros((len(masks), height, width), bool)
  # A rim of zeros, and boxes larger by as much, let the edges fade out.
  bins = masks.shape[1]
  padded = np.pad(masks, ((0, 0), (1, 1), (1, 1)))
  half = (boxes[:, 2:] - boxes[:, :2]) * 0.5 * ((bins + 2) / bins)
  center = (boxes[:, 2:] + boxes[:, :2]) * 0.5
  corners = np.concatenate([center - half, center + half], axis=1)
  # Toward zero, as torch rounds to integers.
  for mask, corner, image in zip(
    padded, np.trunc(corners).astype(np.int64), pasted, strict=True
  ):
    left, top, right, bottom = map(int, corner)
    rows = _stretch(mask.shape[0], top, bottom, height, mask.dtype)
    columns = _stretch(mask.shape[1], left, right, width, mask.dtype)
    region = image[_inside(top, bottom, height), _inside(left, right, width)]
    region[:] = rows @ mask @ columns.T > threshold
  return pasted


def _inside(first: int, last: int, length: int) -> slice:
  """The pixels from first to last that an image has."""
  start = min(max(first, 0), length)
  return slice(start, max(min(last + 1, length), start))


def _stretch(
  count: int, first: int, last: int, length: int, dtype: np.dtype
) -> np.ndarray:
  """[pixels inside, count]: bilinear weights of the mask's rows."""
  inside = _inside(first, last, length)
  pixels = np.arange(inside.start, inside.stop) - first
  ratio = dtype.type(count) / dtype.type(max(last - first + 1, 1))
  source = np.maximum((pixels.astype(dtype) + 0.5) * ratio - 0.5, 0)
  low = np.minimum(source.astype(np.int64), count - 1)
  high = np.minimum(low + 1, count - 1)
  above = (source - low).astype(dtype)
  matrix = np.zeros((len(pixels), count), dtype)
  row = np.arange(len(pixels))
  matrix[row, low] += 1 - above
  matrix[row, high] += above
  return matrix

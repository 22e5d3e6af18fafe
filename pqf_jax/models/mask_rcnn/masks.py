"""Instance masks, cropped for training and pasted into images for evaluation.

A network's mask is a small square that covers a box. Masks of images hold eight
pixels a byte, the first pixel in the highest bit (`np.packbits`).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pqf_jax.models.mask_rcnn import resize, roi_align
from pqf_jax.models.mask_rcnn.resize import Array

# Boxes whose masks are unpacked at a time: 16 of 640 x 640 are 26 MB.
NUM_UNPACKED = 16
# Probability that a pixel of an object exceeds.
THRESHOLD = 0.5


def crop_masks(
  packed: jax.Array,
  object_index: jax.Array,
  boxes: jax.Array,
  size: jax.Array,
  scaled: jax.Array,
  *,
  num_bins: int,
  longest: int,
) -> jax.Array:
  """Computes the mask targets of the given boxes.

  This is ROIAlign of the scaled mask. Each bin is the mean of as many bilinear
  samples as it has pixels, rounded up, along each side; the values are not
  rounded to 0 and 1. The scaling (nearest) is part of the sampling: the large
  masks are never stored.

  Args:
    packed: uint8 [G, S, ceil(T / 8)], masks of the objects of an image, in
      original pixels.
    object_index: int [R], the object of each box.
    boxes: [R, 4], in scaled pixels.
    size: int [2], height and width of the original image.
    scaled: int [2], the same after scaling.
    num_bins: P, bins along each side.
    longest: bound of the sides of boxes, in scaled pixels (static).

  Returns:
    [R, P, P] from 0 to 1, of the boxes' type.
  """
  lengths = packed.shape[1], 8 * packed.shape[2]
  settings = {"num_bins": num_bins, "num_samples": -(-longest // num_bins) + 1}
  rows = _bin_weights(
    boxes[:, 1::2], size[0], scaled[0], lengths[0], **settings
  )
  columns = _bin_weights(
    boxes[:, 0::2], size[1], scaled[1], lengths[1], **settings
  )

  def crop(arguments: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    index, row, column = arguments
    mask = jnp.unpackbits(packed[index], axis=-1).astype(boxes.dtype)
    return jnp.einsum(
      "ph,hw,qw->pq", row, mask, column, precision=lax.Precision.HIGHEST
    )

  return lax.map(crop, (object_index, rows, columns), batch_size=NUM_UNPACKED)


def _bin_weights(
  ends: jax.Array,
  length: jax.Array,
  scaled: jax.Array,
  buffer: int,
  *,
  num_bins: int,
  num_samples: int,
) -> jax.Array:
  """Returns [R, P, buffer], the weight of each original row in each bin."""
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
  masks: np.ndarray, boxes: np.ndarray, height: int, width: int
) -> np.ndarray:
  """Pastes masks into their boxes on the host; equal to torchvision's.

  Args:
    masks: [N, P, P] probabilities.
    boxes: [N, 4] in pixels of the image.
    height: of the image.
    width: of the image.

  Returns:
    bool [N, height, width].
  """
  masks, boxes = np.asarray(masks), np.asarray(boxes)
  pasted = np.zeros((len(masks), height, width), bool)
  padded, corners = _with_rim(masks, boxes)
  for mask, corner, image in zip(padded, corners, pasted, strict=True):
    left, top, right, bottom = map(int, corner)
    rows = slice(max(top, 0), max(bottom + 1, 0))
    columns = slice(max(left, 0), max(right + 1, 0))
    by_row = _stretch(np.arange(height)[rows], top, bottom, mask)
    by_column = _stretch(np.arange(width)[columns], left, right, mask)
    image[rows, columns] = by_row @ mask @ by_column.T > THRESHOLD
  return pasted


def paste_on_device(
  masks: jax.Array, boxes: jax.Array, *, canvas: tuple[int, int]
) -> jax.Array:
  """Pastes masks under jit, into canvases of one size; see `paste_masks`.

  It computes all pixels of the canvas, `paste_masks` only those in boxes.

  Args:
    masks: [N, P, P] probabilities.
    boxes: [N, 4] in pixels of the image, which is the top left of the canvas.
    canvas: height and width of the result; the caller cuts off pixels outside
      of the image.

  Returns:
    bool [N, *canvas].
  """
  padded, corners = _with_rim(masks, boxes)

  def stretch(first: jax.Array, last: jax.Array, length: int) -> jax.Array:
    pixels = jnp.arange(length, dtype=jnp.int32)[None]
    inside = (pixels >= first) & (pixels <= last)
    return jnp.where(
      inside[..., None], _stretch(pixels, first, last, padded), 0
    )

  return (
    jnp.einsum(
      "nhp,npq,nwq->nhw",
      stretch(corners[:, 1:2], corners[:, 3:4], canvas[0]),
      padded,
      stretch(corners[:, 0:1], corners[:, 2:3], canvas[1]),
      precision=lax.Precision.HIGHEST,
    )
    > THRESHOLD
  )


def _with_rim(masks: Array, boxes: Array) -> tuple[Array, Array]:
  """Adds a rim of zeros to masks and enlarges their boxes; edges fade out.

  Returns:
    (masks [N, P + 2, P + 2], first and last pixels int [N, 4] as x1, y1, x2,
    y2), NumPy or JAX arrays as the arguments are.
  """
  numpy = masks.__array_namespace__()
  bins = masks.shape[1]
  half = (boxes[:, 2:] - boxes[:, :2]) * 0.5 * ((bins + 2) / bins)
  center = (boxes[:, 2:] + boxes[:, :2]) * 0.5
  corners = numpy.concatenate([center - half, center + half], axis=1)
  # Toward zero, as torch rounds to integers.
  corners = numpy.trunc(corners).astype(np.int32)
  return numpy.pad(masks, ((0, 0), (1, 1), (1, 1))), corners


def _stretch(pixels: Array, first: Array, last: Array, mask: Array) -> Array:
  """Returns the bilinear weights of a mask's rows, [*pixels, P + 2]."""
  numpy = mask.__array_namespace__()
  count = mask.shape[-1]
  low, high, above = resize.bilinear_sources(
    pixels - first, count, last - first + 1, mask.dtype
  )
  low, high, above = low[..., None], high[..., None], above[..., None]
  rows = numpy.arange(count, dtype=np.int32).reshape((1,) * pixels.ndim + (-1,))
  weights = numpy.where(rows == low, 1 - above, 0)
  return weights + numpy.where(rows == high, above, 0)

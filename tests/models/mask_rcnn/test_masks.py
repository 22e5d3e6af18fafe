import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pqf_jax.models.mask_rcnn import masks as mask_ops
from pqf_jax.models.mask_rcnn import resize


def bilinear(plane, y, x):
  height, width = plane.shape
  if not (-1 <= y <= height and -1 <= x <= width):
    return 0.0
  y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
  top, left = int(y), int(x)
  down, right = min(top + 1, height - 1), min(left + 1, width - 1)
  dy, dx = y - top, x - left
  upper = plane[top, left] * (1 - dx) + plane[top, right] * dx
  lower = plane[down, left] * (1 - dx) + plane[down, right] * dx
  return upper * (1 - dy) + lower * dy


def pool(plane, box, num_bins):
  """Pools with as many samples as a bin has pixels, by the definition."""
  result = np.zeros((num_bins, num_bins))
  sides = np.maximum(np.asarray(box[2:]) - box[:2], 1) / num_bins
  counts = [math.ceil(side) for side in sides]
  for i, j in np.ndindex(num_bins, num_bins):
    for a, b in np.ndindex(counts[1], counts[0]):
      y = box[1] + (i + (a + 0.5) / counts[1]) * sides[1]
      x = box[0] + (j + (b + 0.5) / counts[0]) * sides[0]
      result[i, j] += bilinear(plane, y, x) / np.prod(counts)
  return result


def scale_nearest(mask, scaled):
  index = [
    np.minimum(
      np.floor(np.arange(n, dtype=np.float32) * np.float32(m / n)), m - 1
    ).astype(int)
    for n, m in zip(scaled, mask.shape, strict=True)
  ]
  return mask[np.ix_(*index)]


@functools.partial(jax.jit, static_argnames=("num_bins", "longest"))
def crop_masks(*arguments, num_bins, longest):
  return mask_ops.crop_masks(*arguments, num_bins=num_bins, longest=longest)


@pytest.mark.parametrize("size", [(40, 30), (13, 37), (44, 44)])
def test_crops_are_what_the_definition_says_of_the_scaled_mask(size):
  rng = np.random.default_rng(0)
  buffer, num_bins, longest = 44, 4, 70
  masks = np.zeros((3, buffer, buffer), bool)
  masks[:, : size[0], : size[1]] = rng.random((3, *size)) < 0.5
  scaled = resize.scaled_lengths(buffer, 50, longest)
  scaled = scaled[size], scaled[size[::-1]]
  corner = rng.uniform(-2, 20, (20, 2))
  boxes = np.concatenate([corner, corner + rng.uniform(0, 50, (20, 2))], 1)
  boxes[-1] = [0, 0, scaled[1], scaled[0]]
  objects = rng.integers(0, 3, 20)
  with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
    crops = crop_masks(
      np.packbits(masks, axis=-1),
      objects,
      boxes,
      np.asarray(size),
      np.asarray(scaled),
      num_bins=num_bins,
      longest=longest,
    )
    crops = np.asarray(crops)
  expected = [
    pool(scale_nearest(masks[g, : size[0], : size[1]], scaled), box, num_bins)
    for g, box in zip(objects, boxes, strict=True)
  ]
  np.testing.assert_allclose(crops, expected, atol=1e-12)
  assert 0 < crops.min(where=crops > 0, initial=1) < 0.5 < crops.max() <= 1


def test_a_mask_fills_the_pixels_of_its_box_counting_both_ends():
  masks = np.ones((3, 28, 28), np.float32)
  boxes = [[10, 5, 38, 61], [-20, -20, 8, 8], [3, 4, 9, 10]]
  pasted = mask_ops.paste_masks(masks, np.asarray(boxes, np.float32), 80, 50)
  assert pasted.dtype == bool and pasted.shape == (3, 80, 50)
  # Boxes grow by 1/14 around their center, are cut to integers, and hold both;
  # the rim of the large ones is zero.
  for image, (left, top, right, bottom) in zip(
    pasted, [(10, 5, 38, 61), (0, 0, 8, 8), (2, 3, 9, 10)], strict=True
  ):
    expected = np.zeros((80, 50), bool)
    expected[top : bottom + 1, left : right + 1] = True
    np.testing.assert_array_equal(image, expected)


def test_boxes_outside_the_image_paste_nothing():
  boxes = np.asarray([[60, 5, 90, 20], [-90, 5, -60, 20], [0, 0, 0, 0]])
  pasted = mask_ops.paste_masks(np.ones((3, 28, 28)), boxes * 1.0, 30, 40)
  assert not pasted[:2].any()
  assert pasted[2].sum() <= 4


@pytest.mark.parametrize("canvas", [(40, 56), (64, 64)])
def test_the_device_pastes_what_the_host_does(canvas):
  rng = np.random.default_rng(3)
  corners = rng.uniform(-6, 50, (60, 2))
  boxes = np.concatenate([corners, corners + rng.uniform(0, 40, (60, 2))], 1)
  masks = rng.random((60, 28, 28))
  height, width = 40, 50
  expected = mask_ops.paste_masks(masks, boxes, height, width)
  assert 0.1 < expected.any((1, 2)).mean() < 1
  with jax.enable_x64(True):
    pasted = jax.jit(
      lambda *arguments: mask_ops.paste_on_device(*arguments, canvas=canvas)
    )(jnp.array(masks), jnp.array(boxes))
  pasted = np.asarray(pasted)
  assert pasted.shape == (60, *canvas)
  np.testing.assert_array_equal(pasted[:, :height, :width], expected)


def test_pasting_equals_torchvisions():
  try:
    import torch
    from torchvision.models.detection import roi_heads
  except (ImportError, RuntimeError):
    pytest.skip("no working torchvision")
  rng = np.random.default_rng(0)
  corner = rng.uniform(-20, 90, (60, 2))
  boxes = np.concatenate([corner, corner + rng.uniform(0, 70, (60, 2))], 1)
  boxes = np.clip(boxes, 0, [[100, 80, 100, 80]])
  masks = rng.random((60, 28, 28))
  expected = roi_heads.paste_masks_in_image(
    torch.tensor(masks)[:, None], torch.tensor(boxes), (80, 100)
  )[:, 0]
  pasted = mask_ops.paste_masks(masks, boxes, 80, 100)
  np.testing.assert_array_equal(pasted, expected.numpy() > 0.5)
  assert 0.01 < pasted.mean() < 0.5

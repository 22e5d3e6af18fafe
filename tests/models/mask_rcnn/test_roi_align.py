import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pqf_jax.models.mask_rcnn import roi_align

SIZE = (96, 128)
CANVAS = (128, 160)
CHANNELS = 3
SPECIAL = [
  [0, 0, 112, 112],  # the first size of the next map
  [0, 0, 111.99, 111.99],
  [-30, -30, -20, -20],  # outside
  [90, 60, 400, 300],  # beyond the border
  [127, 95, 128, 96],
  [50, 50, 50, 50],  # empty
  [10, 10, 10.2, 60],  # thinner than a position
  [0, 0, 128, 96],
  [-300, -200, 400, 300],
]


def draw_maps(canvas=CANVAS, levels=4):
  rng = np.random.default_rng(0)
  strides = [4 * 2**i for i in range(levels)]
  shapes = [(canvas[0] // s, canvas[1] // s) for s in strides]
  return [rng.normal(size=(*shape, CHANNELS)) for shape in shapes]


def draw_boxes(count=40):
  rng = np.random.default_rng(1)
  corner = rng.uniform(-10, 100, (count, 2))
  sides = np.exp(rng.uniform(-1, 6, (count, 2)))
  return np.concatenate([np.concatenate([corner, corner + sides], 1), SPECIAL])


def level_of(box):
  area = max(box[2] - box[0], 0) * max(box[3] - box[1], 0)
  if area == 0:
    return 0
  level = math.floor(4 + math.log2(math.sqrt(area) / 224) + 1e-6)
  return min(max(level, 2), 5) - 2


def bilinear(plane, y, x):
  """Computes one sample by the definition."""
  height, width = plane.shape[:2]
  if not (-1 <= y <= height and -1 <= x <= width):
    return np.zeros(plane.shape[2])
  y, x = (min(max(at, 0), n - 1) for at, n in ((y, height), (x, width)))
  top, left = min(int(y), height - 1), min(int(x), width - 1)
  down, right = min(top + 1, height - 1), min(left + 1, width - 1)
  dy, dx = y - top, x - left
  upper = plane[top, left] * (1 - dx) + plane[top, right] * dx
  lower = plane[down, left] * (1 - dx) + plane[down, right] * dx
  return upper * (1 - dy) + lower * dy


def expected_pool(maps, boxes, num_bins):
  pooled = np.zeros((len(boxes), num_bins, num_bins, CHANNELS))
  for result, box in zip(pooled, boxes, strict=True):
    level = level_of(box)
    stride = 4 * 2**level
    plane = maps[level][: SIZE[0] // stride, : SIZE[1] // stride]
    x1, y1, x2, y2 = np.asarray(box) / stride
    height, width = max(y2 - y1, 1) / num_bins, max(x2 - x1, 1) / num_bins
    for i, j in np.ndindex(num_bins, num_bins):
      for a, b in np.ndindex(2, 2):
        y = y1 + (i + (a + 0.5) / 2) * height
        x = x1 + (j + (b + 0.5) / 2) * width
        result[i, j] += bilinear(plane, y, x) / 4
  return pooled


POOLS = [
  jax.jit(pool, static_argnames="num_bins")
  for pool in (roi_align.pool_by_gather, roi_align.pool_by_product)
]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("num_bins", [3, 7])
def test_pooling_is_what_the_definition_says(pool, num_bins):
  maps, boxes = draw_maps(), draw_boxes()
  with jax.enable_x64(True):
    pooled = pool(maps, boxes, np.asarray(SIZE), num_bins=num_bins)
  expected = expected_pool(maps, boxes, num_bins)
  assert {level_of(box) for box in boxes} == {0, 1, 2, 3}
  np.testing.assert_allclose(pooled, expected, atol=1e-12)


def test_both_ways_of_pooling_have_the_same_gradients_and_none_for_boxes():
  maps, boxes = draw_maps(), draw_boxes()
  weights = np.random.default_rng(2).normal(size=(len(boxes), 3, 3, CHANNELS))

  def gradients_of(pool):
    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(maps, boxes):
      pooled = pool(maps, boxes, jnp.asarray(SIZE), num_bins=3)
      return (jnp.asarray(weights) * pooled).sum()

    with jax.enable_x64(True):
      return jax.device_get(gradient(maps, boxes))

  # On CPUs and GPUs `roi_align` gathers.
  by_gather, of_boxes = gradients_of(roi_align.roi_align)
  by_product, _ = gradients_of(roi_align.pool_by_product)
  np.testing.assert_array_equal(of_boxes, 0)
  for one, other in zip(by_gather, by_product, strict=True):
    assert np.abs(one).max() > 0.1
    np.testing.assert_allclose(one, other, atol=1e-12)


def test_what_lies_outside_the_image_is_not_read():
  boxes = np.float32(draw_boxes())
  pooled = []
  for outside in (0.0, np.nan):
    maps = draw_maps()
    for level, x in enumerate(maps):
      stride = 4 * 2**level
      x[SIZE[0] // stride :], x[:, SIZE[1] // stride :] = outside, outside
    maps = [np.float32(x) for x in maps]
    pooled.append(POOLS[0](maps, boxes, np.asarray(SIZE), num_bins=2))
  np.testing.assert_array_equal(*pooled)


@pytest.mark.parametrize("pool", POOLS)
def test_pooling_equals_torchvisions(pool):
  try:
    import torch
    from torchvision import ops
  except (ImportError, RuntimeError):
    pytest.skip("no working torchvision")
  maps, boxes = draw_maps(SIZE), draw_boxes()[:40]
  module = ops.MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
  planes = {str(i): torch.tensor(x.copy()) for i, x in enumerate(maps)}
  planes = {i: x.permute(2, 0, 1)[None] for i, x in planes.items()}
  expected = module(planes, [torch.tensor(boxes)], [SIZE])
  with jax.enable_x64(True):
    pooled = pool(maps, boxes, np.asarray(SIZE), num_bins=7)
  np.testing.assert_allclose(
    np.moveaxis(pooled, 3, 1), expected.numpy(), atol=1e-10
  )


# Nothing but the lowering shows what a platform that is not here would do.
@pytest.mark.parametrize(
  ("platform", "scatters"), [("cpu", True), ("cuda", True), ("tpu", False)]
)
def test_gradients_scatter_except_on_tpus(platform, scatters):
  maps = [jnp.ones((size, size, 8)) for size in (16, 8)]
  boxes, size = jnp.array([[1.0, 2, 30, 40]]), jnp.array([64, 64])

  def loss(maps):
    return roi_align.roi_align(maps, boxes, size, num_bins=7).sum()

  traced = jax.jit(jax.grad(loss)).trace(maps)
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  assert ("stablehlo.scatter" in text) == scatters
  assert ("stablehlo.dot_general" in text) == (not scatters)

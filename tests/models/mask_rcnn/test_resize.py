import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pqf_jax.models.mask_rcnn import resize

SIZES = [(40, 53), (64, 20), (31, 31), (1, 7), (64, 64)]


def test_lengths_are_rounded_down_in_double_precision():
  table = resize.scaled_lengths(2000, 800, 1333)
  for a, b in [(161, 161), (480, 640), (640, 427), (1, 1), (50, 2000)]:
    scale = min(800 / min(a, b), 1333 / max(a, b))
    expected = [math.floor(float(side) * scale) for side in (a, b)]
    assert [table[a, b], table[b, a]] == [max(n, 1) for n in expected]
  # torchvision's own surprise: so many squares do not become 800.
  squares = table[np.arange(16, 2000), np.arange(16, 2000)]
  assert set(squares.tolist()) == {799, 800} and (squares == 799).sum() == 85


def bilinear(image, height, width):
  """Scales by the definition, one pixel at a time, without antialiasing."""
  result = np.zeros((height, width, image.shape[2]))
  for i, j in np.ndindex(height, width):
    y = max((i + 0.5) * image.shape[0] / height - 0.5, 0)
    x = max((j + 0.5) * image.shape[1] / width - 0.5, 0)
    for a, b in np.ndindex(2, 2):
      row = min(int(y) + a, image.shape[0] - 1)
      column = min(int(x) + b, image.shape[1] - 1)
      weight = abs(1 - a - y + int(y)) * abs(1 - b - x + int(x))
      result[i, j] += weight * image[row, column]
  return result


def test_one_program_scales_images_of_all_sizes_within_their_canvas():
  rng = np.random.default_rng(0)

  def scale(buffer, size):
    (scaled,) = resize.scaled_sizes(size[None], 64, 30, 60)
    return resize.resize_image(buffer, size, scaled, canvas=(32, 64)), scaled

  # A compiled program serves all sizes: it cannot be compiled anew.
  program = (
    jax.jit(scale)
    .lower(
      jax.ShapeDtypeStruct((64, 64, 2), jnp.float32),
      jax.ShapeDtypeStruct((2,), jnp.int32),
    )
    .compile()
  )
  for size in SIZES:
    buffer = rng.normal(size=(64, 64, 2))  # no zeros around the image
    image, scaled = program(np.float32(buffer), np.int32(size))
    height, width = map(int, scaled)
    expected = bilinear(buffer[: size[0], : size[1]], height, width)
    visible = min(height, 32), min(width, 64)
    np.testing.assert_allclose(
      image[: visible[0], : visible[1]],
      expected[: visible[0], : visible[1]],
      atol=1e-4,
    )
    assert not image[height:].any() and not image[:, width:].any()


def test_resizing_equals_torchs():
  functional = pytest.importorskip("torch.nn.functional")
  import torch

  rng = np.random.default_rng(0)
  image = rng.normal(size=(37, 53, 3))
  settings = {"size": (61, 40)}
  expected = functional.interpolate(
    torch.tensor(image).permute(2, 0, 1)[None],
    mode="bilinear",
    align_corners=False,
    **settings,
  )[0]
  with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
    ours = resize.resize_image(
      jnp.asarray(image),
      jnp.asarray([37, 53]),
      jnp.asarray(settings["size"]),
      canvas=settings["size"],
    )
  np.testing.assert_allclose(
    np.moveaxis(ours, 2, 0), expected.numpy(), atol=1e-12
  )
  for before, after in ((37, 61), (53, 40), (640, 1066), (427, 800)):
    line = torch.arange(before, dtype=torch.float32)[None, None]
    nearest = functional.interpolate(line, size=after)[0, 0]
    source = resize.nearest_source(
      jnp.arange(after), jnp.int32(before), jnp.int32(after)
    )
    np.testing.assert_array_equal(source, nearest.numpy())

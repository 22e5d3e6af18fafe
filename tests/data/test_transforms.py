import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pqf_jax.data import transforms

BELOW_ONE = st.floats(0, 1, exclude_max=True)


def noise(height: int, width: int) -> np.ndarray:
  rng = np.random.default_rng(height * 1000 + width)
  return rng.integers(1, 256, (height, width, 3), dtype=np.uint8)


@given(
  height=st.integers(4, 9),
  width=st.integers(4, 9),
  size=st.integers(1, 4),
  padding=st.integers(0, 3),
  draws=st.tuples(BELOW_ONE, BELOW_ONE, BELOW_ONE),
)
def test_a_crop_is_one_of_the_crops_of_the_padded_image(
  height, width, size, padding, draws
):
  image = noise(height, width)
  crop = transforms.random_crop(
    image, np.array(draws), size=size, padding=padding, flip_probability=0.5
  )
  padded = np.pad(image, ((padding,) * 2, (padding,) * 2, (0, 0)))
  rows, columns = (side + 2 * padding - size + 1 for side in (height, width))
  top, left = int(np.floor(draws[0] * rows)), int(np.floor(draws[1] * columns))
  expected = np.empty((size, size, 3), np.uint8)
  for row in range(size):
    for column in range(size):
      source = size - 1 - column if draws[2] < 0.5 else column
      expected[row, column] = padded[top + row, left + source]
  np.testing.assert_array_equal(crop, expected)
  assert crop.dtype == np.uint8


def test_every_place_is_drawn_equally_often_and_half_are_mirrored():
  image = np.arange(4, dtype=np.uint8).reshape(2, 2, 1).repeat(3, 2) + 1
  crops = [
    transforms.random_crop(
      image,
      np.array([row, column, flip]),
      size=2,
      padding=1,
      flip_probability=0.5,
    )[..., 0].tobytes()
    for row in (np.arange(6) + 0.5) / 6
    for column in (np.arange(6) + 0.5) / 6
    for flip in (0.25, 0.75)
  ]
  # 3 x 3 places, two ways round, four times each.
  assert len(set(crops)) == 18
  assert {crops.count(crop) for crop in crops} == {4}


def test_without_mirroring_no_draw_mirrors():
  image = noise(4, 4)
  for draw in (0.0, 0.5, 0.999):
    crop = transforms.random_crop(
      image, np.array([0, 0, draw]), size=4, padding=0, flip_probability=0.0
    )
    np.testing.assert_array_equal(crop, image)


@pytest.mark.parametrize(
  ("before", "after"),
  [
    # (width, height) as torchvision 0.28 gives for resize(image, 256).
    ((500, 375), (341, 256)),
    ((375, 500), (256, 341)),
    ((224, 224), (256, 256)),
    ((256, 300), (256, 300)),
    ((3, 700), (256, 59733)),
  ],
)
def test_the_longer_side_is_rounded_down(before, after):
  image = Image.new("RGB", before)
  assert transforms.resize_short_side(image, 256).size == after


def test_resizing_weighs_by_distance_over_all_pixels_that_are_covered():
  # Antialiased: halving covers 4 pixels with weights 1, 3, 3, 1.
  ramp = np.zeros((8, 8, 3), np.uint8)
  ramp[3] = 160
  image = transforms.resize_short_side(Image.fromarray(ramp), 4)
  np.testing.assert_array_equal(np.asarray(image)[:, 0, 0], [0, 60, 20, 0])


@pytest.mark.parametrize(
  ("side", "first"),
  # Python's round of 2.5 is 2 and of 3.5 is 4, and so is torchvision's offset.
  [(4, 0), (5, 0), (6, 1), (7, 2), (8, 2), (9, 2), (11, 4)],
)
def test_the_center_crop_starts_where_torchvision_starts(side, first):
  image = noise(side, 6)
  crop = transforms.center_crop(Image.fromarray(image), 4)
  np.testing.assert_array_equal(np.asarray(crop), image[first : first + 4, 1:5])


@pytest.mark.parametrize("shape", [(3,), (2, 5, 4, 3)])
def test_normalized_pixels(shape):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, shape, dtype=np.uint8)
  mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
  expected = (images.astype(np.float64) / 255 - mean) / std
  for function in (transforms.normalize, jax.jit(transforms.normalize)):
    normalized = function(images, mean, std)
    assert normalized.dtype == jnp.float32
    np.testing.assert_allclose(normalized, expected, rtol=1e-5, atol=1e-6)

"""What is done to images, in general and by torchvision's definitions."""

import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pqf_jax import data, errors
from pqf_jax.data import transforms

BELOW_ONE = st.floats(0, 1, exclude_max=True)
USUAL = data.Preparation(12, 8, 0, "crop,flip")
AUGMENTATIONS = st.sampled_from(transforms.AUGMENTATIONS)


def noise(height: int, width: int) -> Image.Image:
  rng = np.random.default_rng(height * 1000 + width)
  return Image.fromarray(
    rng.integers(1, 256, (height, width, 3), dtype=np.uint8)
  )


@given(
  height=st.integers(2, 20),
  width=st.integers(2, 20),
  resize=st.sampled_from([0, 8, 11]),
  augmentation=AUGMENTATIONS,
  data_=st.data(),
)
def test_every_image_becomes_a_square_of_the_crops_size(
  height, width, resize, augmentation, data_
):
  preparation = USUAL.changed(resize=resize, augmentation=augmentation)
  draws = data_.draw(
    st.lists(
      BELOW_ONE,
      min_size=preparation.num_draws,
      max_size=preparation.num_draws,
    )
  )
  image = noise(height, width)
  array = np.asarray(preparation.for_training(image))
  for result in (
    preparation.augment(array, np.array(draws)),
    np.asarray(preparation.for_test(image)),
  ):
    assert result.shape == (8, 8, 3) and result.dtype == np.uint8


@pytest.mark.parametrize("augmentation", ["none", "flip"])
def test_without_a_crop_training_images_are_test_images(augmentation):
  preparation = USUAL.changed(augmentation=augmentation)
  image = noise(20, 31)
  expected = np.asarray(preparation.for_test(image))
  array = np.asarray(preparation.for_training(image))
  for draw in (0.2, 0.5, 0.9):
    result = preparation.augment(array, np.array([0.9, 0.9, draw]))
    flips = augmentation == "flip" and draw < 0.5
    np.testing.assert_array_equal(
      result, expected[:, ::-1] if flips else expected
    )


@pytest.mark.parametrize("augmentation", transforms.AUGMENTATIONS)
def test_only_a_flip_mirrors(augmentation):
  ramp = np.arange(16, dtype=np.uint8)[None, :, None] * 10
  image = np.broadcast_to(ramp, (16, 16, 3)).copy()
  preparation = USUAL.changed(resize=0, crop=16, augmentation=augmentation)
  draws = np.full(preparation.num_draws, 0.25)
  result = preparation.augment(image, draws)[8, :, 0].astype(int)
  falls = (np.diff(result) <= 0).all()
  assert falls == ("flip" in augmentation)


@given(
  height=st.integers(1, 7),
  width=st.integers(1, 7),
  row=BELOW_ONE,
  column=BELOW_ONE,
)
def test_a_small_image_that_is_not_resized_is_seen_whole(
  height, width, row, column
):
  preparation = USUAL.changed(resize=0, augmentation="crop")
  array = np.asarray(noise(height, width))
  for result in (
    np.asarray(preparation.for_test(Image.fromarray(array))),
    preparation.augment(array, np.array([row, column, 0.0])),
  ):
    rows, columns = (np.flatnonzero(result.any((2, axis))) for axis in (1, 0))
    seen = result[rows[0] :, columns[0] :][:height, :width]
    np.testing.assert_array_equal(seen, array)
    assert np.count_nonzero(result) == np.count_nonzero(array)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"crop": 13}, "crop is 13, but images are resized to 12 pixels"),
    ({"resize": 7}, "crop is 8, but images are resized to 7 pixels"),
    ({"padding": 8}, "padding is 8, so that crops of 8 pixels may hold"),
    (
      {"padding": 2, "augmentation": "flip"},
      "padding is 2, which only a random crop uses, .* is 'flip'",
    ),
  ],
)
def test_settings_that_do_not_fit_each_other(changes, message):
  with pytest.raises(errors.InputError, match=message):
    USUAL.changed(**changes)


def test_padding_goes_with_the_crop():
  padded = USUAL.changed(padding=2)
  assert padded.padding == 2
  assert padded.changed(augmentation="random_resized_crop").padding == 0
  assert USUAL.changed(resize=0, crop=99).crop == 99


def test_parts_lie_inside_and_have_torchvisions_areas_and_shapes():
  # The image says where its pixels are.
  height, width = 60, 90
  place = np.zeros((height, width, 3), np.uint8)
  place[..., 0], place[..., 1] = np.mgrid[:height, :width]
  rng = np.random.default_rng(0)
  for draws in rng.random((200, 2 * transforms.ATTEMPTS + 2)):
    part = transforms.random_resized_crop(place, draws, size=200)
    rows, columns = (
      1 + int(part[..., i].max()) - int(part[..., i].min()) for i in (0, 1)
    )
    share = rows * columns / (height * width)
    assert 0.07 < share <= 1
    assert 0.7 < columns / rows < 1.42


@pytest.fixture
def torchvision():
  pytest.importorskip("torch")
  return pytest.importorskip("torchvision.transforms")


SIZES = [(20, 31), (31, 20), (8, 8), (5, 9), (9, 4), (3, 3), (90, 10)]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("resize", [0, 12])
def test_test_images_are_torchvisions(torchvision, height, width, resize):
  image = noise(height, width)
  steps = [torchvision.Resize(resize)] if resize else []
  expected = torchvision.Compose([*steps, torchvision.CenterCrop(8)])(image)
  ours = USUAL.changed(resize=resize).for_test(image)
  np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected))


class Draws:
  """Stands for torch where torchvision draws, with given numbers."""

  def __init__(self, torch, draws):
    self.tensor, self.log, self.exp = torch.tensor, torch.log, torch.exp
    self._torch, self._draws = torch, iter(draws)

  def empty(self, size):
    def uniform(low, high):
      return self._torch.tensor(
        [float(low) + next(self._draws) * float(high - low)]
      )

    return types.SimpleNamespace(uniform_=uniform)

  def randint(self, low, high, size):
    return self._torch.tensor([low + int(next(self._draws) * (high - low))])


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("seed", range(3))
def test_random_resized_crops_are_torchvisions(
  torchvision, monkeypatch, height, width, seed
):
  import torch

  image = noise(height, width)
  draws = np.random.default_rng(seed).random(2 * transforms.ATTEMPTS + 2)
  ours = transforms.random_resized_crop(np.asarray(image), draws, size=8)
  # The place is drawn after the attempt that succeeds.
  for attempts in range(1, transforms.ATTEMPTS + 1):
    given_draws = [*draws[: 2 * attempts], *draws[-2:]]
    monkeypatch.setattr(
      torchvision.transforms, "torch", Draws(torch, given_draws)
    )
    try:
      expected = torchvision.RandomResizedCrop(8)(image)
    except (RuntimeError, StopIteration):
      continue
    break
  np.testing.assert_array_equal(ours, np.asarray(expected))


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("padding", [0, 2])
def test_random_crops_are_torchvisions(
  torchvision, monkeypatch, height, width, padding
):
  import torch

  image = noise(height, width)
  preparation = USUAL.changed(resize=0, padding=padding, augmentation="crop")
  draws = np.array([0.37, 0.81, 0.0])
  monkeypatch.setattr(torchvision.transforms, "torch", Draws(torch, draws))
  crop = torchvision.RandomCrop(8, padding=padding, pad_if_needed=True)
  np.testing.assert_array_equal(
    preparation.augment(np.asarray(image), draws), np.asarray(crop(image))
  )

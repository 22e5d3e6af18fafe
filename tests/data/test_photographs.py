"""Own images: sizes follow from the images, which are not enlarged."""

import numpy as np
import pytest
from PIL import Image

from pqf_jax import data, errors
from pqf_jax.data import photographs

CLASSES = ("ant", "bee")


def write(top, sizes, classes=CLASSES):
  """Writes an image of each (width, height) to each class and split."""
  rng = np.random.default_rng(0)
  for split in ("train", "val"):
    for name in classes:
      folder = top / split / name
      folder.mkdir(parents=True)
      for i, (width, height) in enumerate(sizes):
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


def opened(top, **settings):
  return data.get_dataset("image_folder", data_dir=str(top), **settings)


def pixels(top, split="val", name="ant", number=0):
  return np.asarray(Image.open(top / split / name / f"{number}.png"))


@pytest.mark.parametrize("image_size", [None, 32])
def test_small_images_stay_as_they_are(tmp_path, image_size):
  write(tmp_path, [(32, 32)] * 3)
  dataset = opened(tmp_path, image_size=image_size)
  for i in range(3):
    np.testing.assert_array_equal(
      dataset.test[i]["image"], pixels(tmp_path, number=i)
    )
    np.testing.assert_array_equal(
      dataset.train[i]["image"], pixels(tmp_path, "train", number=i)
    )
  assert dataset.preparation == data.Preparation(32, 32, 4, "crop,flip")


@pytest.mark.parametrize(
  ("sides", "image_size", "expected"),
  [
    ([400] * 3, None, (256, 224, 0)),  # ImageNet's
    ([256] * 3, None, (256, 224, 0)),
    ([240] * 3, None, (240, 224, 0)),  # not enlarged to 256
    ([224] * 3, None, (224, 224, 28)),
    ([100] * 3, None, (100, 100, 12)),
    ([30, 32, 500], None, (32, 32, 4)),  # the median, not the mean
    ([30, 300, 500], None, (256, 224, 0)),
    ([400] * 3, 112, (128, 112, 0)),
    ([32] * 3, 28, (32, 28, 0)),
    ([32] * 3, 64, (64, 64, 8)),  # enlarged, since it was asked for
  ],
)
def test_sizes_follow_from_the_median_of_the_short_sides(
  tmp_path, sides, image_size, expected
):
  write(tmp_path, [(side + 7, side) for side in sides])
  preparation = opened(tmp_path, image_size=image_size).preparation
  assert preparation[:3] == expected


def test_the_config_changes_what_is_usual(tmp_path):
  write(tmp_path, [(48, 40)] * 3)
  dataset = data.prepare_otherwise(
    opened(tmp_path), resize=0, crop=24, augmentation="random_resized_crop"
  )
  assert dataset.preparation == data.Preparation(
    0, 24, 0, "random_resized_crop"
  )
  np.testing.assert_array_equal(
    dataset.test[0]["image"], pixels(tmp_path)[8:32, 12:36]
  )
  (batch,) = data.train_batches(dataset, batch_size=6, seed=0, num_steps=1)
  assert batch["image"].shape == (6, 24, 24, 3)


def test_a_data_set_of_ones_own_prepares_its_images_itself(tmp_path):
  write(tmp_path, [(8, 8)] * 2)
  own = opened(tmp_path)._replace(name="own", remake=None)
  with pytest.raises(
    errors.InputError, match="'own' prepares .* config.data.crop cannot be"
  ):
    data.prepare_otherwise(own, crop=4)


def test_what_is_held_in_memory_has_a_largest_size():
  with pytest.raises(errors.InputError, match="asks for images of 9999 pixels"):
    data.prepare_otherwise(data.get_dataset("digits"), resize=9999)


def test_damaged_files_do_not_count(tmp_path):
  write(tmp_path, [(32, 32)] * 3)
  for name in CLASSES:
    (tmp_path / "train" / name / "0.png").write_bytes(b"damaged")
  assert opened(tmp_path).preparation.crop == 32
  for path in tmp_path.glob("train/*/*.png"):
    path.write_bytes(b"damaged")
  assert opened(tmp_path).preparation == photographs.usual(None)


def test_unlabelled_images_are_prepared_as_those_with_labels(tmp_path):
  write(tmp_path / "own", [(32, 32)] * 4)
  write(tmp_path / "more", [(64, 96)] * 3, classes=("any",))
  dataset = data.use_unlabelled(
    opened(tmp_path / "own"), str(tmp_path / "more")
  )
  assert len(dataset.train) == 6
  assert dataset.train[0]["image"].shape == (48, 32, 3)
  (batch,) = data.train_batches(dataset, batch_size=6, seed=0, num_steps=1)
  assert batch["image"].shape == (6, 32, 32, 3)
  assert (batch["label"] == -1).all()

"""Images without labels train as the same images with labels do."""

import itertools

import numpy as np
import pytest
from PIL import Image

from pqf_jax import data, errors
from pqf_jax.data import sources


@pytest.fixture(scope="module")
def digits():
  return data.get_dataset("digits")


@pytest.fixture(scope="module")
def folder(digits, tmp_path_factory):
  """Returns a folder with the first 40 training images, in two folders."""
  top = tmp_path_factory.mktemp("unlabelled")
  for number in range(40):
    path = top / f"part{number // 20}" / f"{number:03}.png"
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(digits.train[number]["image"]).save(path)
  return top


def test_batches_are_those_of_the_same_images_with_labels(digits, folder):
  labelled = digits._replace(train=digits.train[:40])
  unlabelled = data.use_unlabelled(digits, str(folder))
  batches = zip(
    *(
      data.train_batches(each, batch_size=8, seed=3, num_steps=7)
      for each in (labelled, unlabelled)
    ),
    strict=True,
  )
  for known, unknown in batches:
    np.testing.assert_array_equal(known["image"], unknown["image"])
    assert (known["label"] >= 0).all() and (unknown["label"] == -1).all()


def test_images_are_resized_as_those_of_the_data_set(folder, tmp_path):
  big = Image.fromarray(
    np.arange(60 * 90 * 3, dtype=np.uint8).reshape(60, 90, 3)
  )
  big.save(tmp_path / "big.png")
  digits = data.get_dataset("digits", image_size=16)
  unlabelled = data.use_unlabelled(digits, str(tmp_path))
  image = unlabelled.train[0]["image"]
  expected = big.resize((16, 16), Image.Resampling.BILINEAR)
  np.testing.assert_array_equal(image, np.asarray(expected))


def test_folders_without_images_are_refused(digits, tmp_path):
  (tmp_path / "notes.txt").write_text("")
  for place, message in (
    (tmp_path, "holds no images"),
    (tmp_path / "nosuch", "is no folder"),
  ):
    with pytest.raises(errors.InputError, match=message):
      data.use_unlabelled(digits, str(place))


def test_a_data_set_that_does_not_say_how_it_resizes_is_refused(folder):
  own = sources.ImageDataset(
    "own", [], [], 2, (0,) * 3, (1,) * 3, lambda image, draws: image
  )
  with pytest.raises(errors.InputError, match="'own' has no `prepare`"):
    data.use_unlabelled(own, str(folder))


def test_the_test_images_stay(digits, folder):
  unlabelled = data.use_unlabelled(digits, str(folder))
  for ours, theirs in itertools.islice(
    zip(unlabelled.test, digits.test, strict=True), 3
  ):
    np.testing.assert_array_equal(ours["image"], theirs["image"])

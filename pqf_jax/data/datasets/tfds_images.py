"""Any data set of image classification that tensorflow-datasets prepares."""

import re
import warnings
from collections.abc import Sequence

from pqf_jax import errors
from pqf_jax.data import decoding, locate, photographs, sources
from pqf_jax.data.formats import tfds_folder

TEST_SPLITS = ("test", "validation", "val")
# Where a data set has training images only, every fifth is a test image.
HELD_OUT = 5


class Part(decoding.EncodedImages):
  """Some of the images of a split."""

  def __init__(
    self, images: decoding.EncodedImages, numbers: Sequence[int]
  ) -> None:
    self._images = images
    self._numbers = numbers

  def __len__(self) -> int:
    return len(self._numbers)

  def __getitem__(self, index: int) -> decoding.EncodedImage:
    return self._images[self._numbers[index]]

  def place(self, index: int) -> str:
    """Returns where an image is stored."""
    return self._images.place(self._numbers[index])


def load(
  name: str, data_dir: str | None, image_size: int | None
) -> sources.ImageDataset:
  """Opens a prepared data set, with sizes as those of `photographs.fitting`.

  Args:
    name: NAME or NAME/CONFIG.
    data_dir: holds NAME/VERSION or NAME/CONFIG/VERSION.
    image_size: see `photographs.fitting`.

  Raises:
    InputError: no such name, not prepared, or of another kind.
  """
  if not re.fullmatch(r"\w+(/[\w-][\w.-]*)?", name):
    raise errors.InputError(
      f"config.data.name is 'tfds:{name}'; give tfds:NAME or tfds:NAME/CONFIG "
      "as tensorflow-datasets lists them, such as tfds:cifar100"
    )
  copy = locate.open_copy(
    name, data_dir, prepare_command=tfds_folder.prepare_command(name)
  )
  train, test = _splits(name, copy)
  return photographs.make_dataset(
    name, train, test, copy.num_classes, photographs.fitting(train, image_size)
  )


def _splits(
  name: str, copy: decoding.EncodedDataset
) -> tuple[decoding.EncodedImages, decoding.EncodedImages]:
  """Returns training and test images; the latter have labels."""
  train = copy.split("train")
  _check_first(name, train)
  for split in TEST_SPLITS:
    if split in copy.split_names:
      test = copy.split(split)
      if _check_first(name, test):
        return train, test
  numbers = range(len(train))
  held_out = numbers[HELD_OUT - 1 :: HELD_OUT]
  if not held_out:
    raise errors.InputError(
      f"{name} has only {len(train)} training images and no others; choose a "
      "larger data set"
    )
  warnings.warn(
    f"{name} has no split {' or '.join(TEST_SPLITS)} with labels: every "
    f"{HELD_OUT}th of its {len(train)} training images is a test image, and "
    "not trained on",
    stacklevel=2,
  )
  kept = [number for number in numbers if number % HELD_OUT != HELD_OUT - 1]
  return Part(train, kept), Part(train, held_out)


def _check_first(name: str, images: decoding.EncodedImages) -> bool:
  """Returns whether the first example has a label.

  Raises:
    InputError: the split is empty, or its first example has no image or label.
  """
  if not len(images):
    raise errors.InputError(f"{name} has a split without images; prepare it")
  try:
    return images[0].label >= 0  # -1 stands for none
  except decoding.DamagedError as error:
    raise errors.InputError(
      f"{images.place(0)} cannot be read ({error}); {name} must be a data set "
      "of image classification, with the features 'image' and 'label'"
    ) from error

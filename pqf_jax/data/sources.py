"""Labelled images by number, whatever their files look like."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from pqf_jax import errors
from pqf_jax.data import batching, transforms

# Of all images of a data set that is held in memory.
MOST_BYTES = 2**34

Record = dict[str, Any]
"""`image` uint8 [H, W, 3] and `label` int."""
Augment = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(uint8 [H, W, 3], float64 [D] in [0, 1)) -> uint8 [S, S, 3]."""
Transform = Callable[[Image.Image], Image.Image]


class Source(Protocol):
  """Images by number; reading has no side effect, and threads may share it.

  A list of records is a source.
  """

  def __len__(self) -> int: ...

  def __getitem__(self, index: int, /) -> Record: ...


class ImageDataset(NamedTuple):
  """Labelled images of one data set.

  Attributes:
    name: as in `get_dataset`.
    train: images for training, of any size that `augment` takes.
    test: images for evaluation, all uint8 [S, S, 3] and ready for `normalize`.
    num_classes: labels are 0 to num_classes - 1.
    mean: of red, green and blue in 0..1, over the training images.
    std: their standard deviation, in the same units.
    augment: (image uint8 [H, W, 3], draws float64 [D] in [0, 1)) -> uint8
      [S, S, 3], a pure function: an image depends on its own draws only, so
      that processes which share a batch make the same images as one alone. D
      is 3, or what `preparation` says.
    prepare: resizes an image as those of `train` were, for `augment`. None:
      images from elsewhere cannot take their place.
    preparation: sizes, crops and augmentation; None: not known.
    remake: another preparation -> the same images prepared so; None: they come
      in one way only. `prepare_images` gives both.
  """

  name: str
  train: Source
  test: Source
  num_classes: int
  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  augment: Augment
  prepare: Transform | None = None
  preparation: transforms.Preparation | None = None
  remake: Callable[[transforms.Preparation], "ImageDataset"] | None = None

  @property
  def num_draws(self) -> int:
    """Random numbers for an image, as its crop's row and column, and flip."""
    return self.preparation.num_draws if self.preparation else 3

  def train_row(self, index: int, draws: np.ndarray) -> batching.Row:
    """Returns `image` uint8 [S, S, 3], augmented, and `label` int32."""
    record = self.train[index]
    image = self.augment(record["image"], draws)
    return {"image": image, "label": np.int32(record["label"])}

  def test_row(self, index: int) -> batching.Row:
    """Returns `image` uint8 [S, S, 3] and `label` int32."""
    record = self.test[index]
    return {"image": record["image"], "label": np.int32(record["label"])}


def prepare_images(
  preparation: transforms.Preparation,
  *,
  name: str,
  train: Callable[[Transform], Source],
  test: Callable[[Transform], Source],
  num_classes: int,
  mean: tuple[float, float, float],
  std: tuple[float, float, float],
  num_in_memory: int = 0,
) -> ImageDataset:
  """Returns a data set whose images are prepared in this way.

  Args:
    preparation: of both splits.
    name: as in `ImageDataset`.
    train: transform -> the training images after it.
    test: transform -> the test images after it.
    num_classes: as in `ImageDataset`.
    mean: as in `ImageDataset`.
    std: as in `ImageDataset`.
    num_in_memory: images of both splits, if they are held in memory.

  Raises:
    InputError: in memory they would take more than `MOST_BYTES`.
  """

  def make(preparation: transforms.Preparation) -> ImageDataset:
    if num_in_memory:
      _check_memory(name, num_in_memory, preparation)
    return ImageDataset(
      name,
      train(preparation.for_training),
      test(preparation.for_test),
      num_classes,
      mean,
      std,
      augment=preparation.augment,
      prepare=preparation.for_training,
      preparation=preparation,
      remake=make,
    )

  return make(preparation)


def preparation_changes(settings: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what `config.data` says of the preparation; {}: as is usual."""
  unsaid = {"resize": -1, "crop": 0, "padding": -1, "augmentation": ""}
  return {
    name: settings[name]
    for name, value in unsaid.items()
    if settings[name] != value
  }


def prepare_otherwise(dataset: ImageDataset, **changes: Any) -> ImageDataset:
  """Returns the data set with another preparation.

  Args:
    dataset: whose preparation is changed.
    **changes: see `transforms.Preparation.changed`.

  Raises:
    InputError: the changes do not fit each other, or the data set comes in one
      way only.
  """
  if dataset.preparation is None or dataset.remake is None:
    raise errors.InputError(
      f"data set {dataset.name!r} prepares its images in its own way, so that "
      f"{', '.join(f'config.data.{name}' for name in changes)} cannot be "
      "given; leave it out, or make the data set by prepare_images"
    )
  return dataset.remake(dataset.preparation.changed(**changes))


def _check_memory(
  name: str, num_images: int, preparation: transforms.Preparation
) -> None:
  """Refuses to hold so many images in memory."""
  resized = preparation.resize
  size = max(
    preparation.crop, *(resized if isinstance(resized, tuple) else (resized,))
  )
  most = math.isqrt(MOST_BYTES // (3 * num_images))
  if size > most:
    raise errors.InputError(
      f"config.data asks for images of {size} pixels a side, but {name} is "
      f"held in memory, where its {num_images} images may have at most {most}; "
      "lower image_size, or resize and crop"
    )

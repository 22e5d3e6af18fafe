"""Labelled images by number, whatever their files look like."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from pqf_jax import errors
from pqf_jax.data import batching

# Of all images of a data set that is held in memory.
MOST_BYTES = 2**34

Record = dict[str, Any]
"""`image` uint8 [H, W, 3] and `label` int."""
Augment = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(uint8 [H, W, 3], float64 [3] in [0, 1)) -> uint8 [S, S, 3]."""


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
    augment: (image uint8 [H, W, 3], draws float64 [3] in [0, 1)) -> uint8
      [S, S, 3], a pure function: an image depends on its own draws only, so
      that processes which share a batch make the same images as one alone.
    prepare: resizes an image as those of `train` were, for `augment`. None:
      images from elsewhere cannot take their place.
  """

  name: str
  train: Source
  test: Source
  num_classes: int
  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  augment: Augment
  prepare: Callable[[Image.Image], Image.Image] | None = None

  @property
  def num_draws(self) -> int:
    """Random numbers for an image: row of the crop, its column, flip."""
    return 3

  def train_row(self, index: int, draws: np.ndarray) -> batching.Row:
    """Returns `image` uint8 [S, S, 3], augmented, and `label` int32."""
    record = self.train[index]
    image = self.augment(record["image"], draws)
    return {"image": image, "label": np.int32(record["label"])}

  def test_row(self, index: int) -> batching.Row:
    """Returns `image` uint8 [S, S, 3] and `label` int32."""
    record = self.test[index]
    return {"image": record["image"], "label": np.int32(record["label"])}


def check_memory(name: str, num_images: int, size: int) -> None:
  """Refuses to hold so many images in memory.

  Args:
    name: of the data set.
    num_images: of all splits.
    size: their side in pixels.

  Raises:
    InputError: they take more than `MOST_BYTES`.
  """
  most = math.isqrt(MOST_BYTES // (3 * num_images))
  if size > most:
    raise errors.InputError(
      f"config.data.image_size is {size}, but {name} is held in memory, where "
      f"its {num_images} images may have at most {most} pixels a side"
    )

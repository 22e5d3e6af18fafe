"""Labelled images by number, whatever their files look like."""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

Record = dict[str, Any]
"""`image` uint8 [H, W, 3] and `label` int."""
Augment = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(uint8 [H, W, 3], float64 [NUM_DRAWS] in [0, 1)) -> uint8 [S, S, 3]."""
# Random numbers for an image: row of the crop, its column, flip.
NUM_DRAWS = 3


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
  """

  name: str
  train: Source
  test: Source
  num_classes: int
  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  augment: Augment


class InMemory:
  """A source that reads all its images when the first one is asked for.

  A data set opens at once this way, and a split that nobody reads costs
  nothing.
  """

  def __init__(self, length: int, read_all: Callable[[], list[Record]]) -> None:
    self._length = length
    self._read_all = read_all
    self._records: list[Record] | None = None
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> Record:
    with self._lock:
      if self._records is None:
        self._records = self._read_all()
    return self._records[index]

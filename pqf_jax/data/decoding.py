"""Decoding of image files into records, and what replaces damaged ones.

A damaged training image is reported in a warning and replaced by the next good
one, so that an image stays a pure function of its number; a run of hours does
not end at one bad file of a million. Beyond `MAX_DAMAGED_SHARE` of a split the
copy itself is bad, which is an error. A damaged test image always is one: an
accuracy that leaves images out, or counts others twice, is not the accuracy.
"""

import threading
import warnings
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from pqf_jax import errors
from pqf_jax.data import sources, transforms

T = TypeVar("T", covariant=True)
Transform = Callable[[Image.Image], Image.Image]
# Of a split's images; every image of ImageNet can be decoded.
MAX_DAMAGED_SHARE = 0.001
# In a small split a few are no sign of a bad copy.
MIN_DAMAGED = 10


class DamagedError(Exception):
  """Stored bytes that cannot be read or decoded; the message says why."""


class EncodedImage(NamedTuple):
  """The bytes of an image file, and the label."""

  data: bytes
  label: int


class Stored(Protocol[T]):
  """Items of files by number; threads may share it.

  Reading raises a `DamagedError` where a checksum shows that the bytes have
  changed since they were written.
  """

  def __len__(self) -> int: ...

  def __getitem__(self, index: int, /) -> T: ...

  def read_all(self) -> Iterable[T]:
    """Reads all in order, where a format does this faster than one by one."""
    return (self[index] for index in range(len(self)))


class EncodedImages(Stored[EncodedImage], Protocol):
  """Image files by number."""

  def place(self, index: int) -> str:
    """Returns where an image is stored, for messages."""


class EncodedDataset(Protocol):
  """A prepared copy of a data set, in whatever format its files are."""

  @property
  def num_classes(self) -> int:
    """The number of classes; labels are below."""

  def split(self, name: str) -> EncodedImages:
    """Returns the images of a split, such as `train`."""


class Records:
  """A source that decodes and transforms each RGB image when it is read.

  Damaged images are refused, unless it is made by `for_training`.

  Attributes:
    damaged: numbers of the damaged images so far.
  """

  def __init__(
    self,
    encoded: EncodedImages,
    num_classes: int,
    transform: Transform,
    *,
    max_damaged: int = 0,
  ) -> None:
    self.damaged: set[int] = set()
    self._encoded = encoded
    self._num_classes = num_classes
    self._transform = transform
    # One image at least must be good to take the place of the others.
    self._max_damaged = min(max_damaged, len(encoded) - 1)
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return len(self._encoded)

  def __getitem__(self, index: int) -> sources.Record:
    return self._decode(index)

  def decode_all(self) -> list[sources.Record]:
    """Returns all records in order."""
    try:
      encoded = list(self._encoded.read_all())
    except DamagedError:  # reading one by one shows which image it is
      return [self[index] for index in range(len(self))]
    return [self._decode(index, image) for index, image in enumerate(encoded)]

  def _decode(
    self, index: int, encoded: EncodedImage | None = None
  ) -> sources.Record:
    while True:
      try:
        encoded = encoded or self._encoded[index]
        image = _decode_image(encoded.data)
      except DamagedError as error:
        self._report_damaged(index, error)
        index, encoded = (index + 1) % len(self), None
        continue
      if not 0 <= encoded.label < self._num_classes:
        raise errors.InputError(
          f"{self._encoded.place(index)} has label {encoded.label}, but the "
          f"data set has classes 0 to {self._num_classes - 1}; prepare it again"
        )
      pixels = np.asarray(self._transform(image))
      return {"image": pixels, "label": encoded.label}

  def _report_damaged(self, index: int, error: DamagedError) -> None:
    with self._lock:
      if index in self.damaged:
        return
      self.damaged.add(index)
      count = len(self.damaged)
    problem = f"{self._encoded.place(index)} cannot be decoded ({error})"
    if not self._max_damaged:
      raise errors.InputError(
        f"{problem}, and the accuracy needs every test image; copy it again"
      )
    if count > self._max_damaged:
      raise errors.InputError(
        f"{problem}: {count} of {len(self)} images are damaged, more than the "
        f"{self._max_damaged} that may be; copy the data set again"
      )
    warnings.warn(
      f"{problem}; the next image takes its place. Damaged so far: {count}; "
      f"more than {self._max_damaged} are an error",
      stacklevel=2,
    )


class InMemory:
  """A source that decodes all its images when the first one is asked for.

  A data set opens at once this way, and a split that nobody reads costs
  nothing.
  """

  def __init__(self, records: Records) -> None:
    self._records = records
    self._decoded: list[sources.Record] | None = None
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> sources.Record:
    with self._lock:
      if self._decoded is None:
        self._decoded = self._records.decode_all()
    return self._decoded[index]


def for_training(
  encoded: EncodedImages, num_classes: int, transform: Transform
) -> Records:
  """Returns records that replace damaged images.

  `MAX_DAMAGED_SHARE` of the images may be damaged, and at least `MIN_DAMAGED`.
  """
  max_damaged = max(MIN_DAMAGED, int(MAX_DAMAGED_SHARE * len(encoded)))
  return Records(encoded, num_classes, transform, max_damaged=max_damaged)


def _decode_image(data: bytes) -> Image.Image:
  try:
    return transforms.decode_image(data)
  except UnidentifiedImageError as error:
    # Its message shows where in memory the bytes are.
    raise DamagedError("not an image file") from error
  except transforms.DECODING_ERRORS as error:
    raise DamagedError(str(error)) from error

"""From encoded images to records, and what is done about damaged images.

A damaged training image is named in a warning and replaced by the next good
one, so that an image stays a pure function of its number; a run of hours does
not end at one bad file of a million. Beyond `MAX_BAD_SHARE` of a split the copy
itself is bad, which is an error. A damaged test image always is one: an
accuracy that leaves images out, or counts others twice, is not the accuracy.
"""

import threading
import warnings
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from pqf_jax import errors
from pqf_jax.data import sources, transforms

Transform = Callable[[Image.Image], Image.Image]
# Of a split's images; all of ImageNet's can be decoded.
MAX_BAD_SHARE = 0.001
# In a small split a few are no sign of a bad copy.
MIN_BAD = 10


class DamagedError(Exception):
  """What is stored cannot be read or decoded; the message says why."""


class EncodedImage(NamedTuple):
  """The bytes of an image file, and the label."""

  data: bytes
  label: int


class EncodedImages(Protocol):
  """Image files by number; threads may share it.

  Reading raises a `DamagedError` where sums tell that the bytes are not those
  that were written.
  """

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> EncodedImage: ...

  def read_all(self) -> Iterable[EncodedImage]:
    """All in order, where that is faster than one by one."""
    ...

  def place(self, index: int) -> str:
    """Where an image is, for messages."""
    ...


class Records:
  """A source that decodes and transforms each image when it is read.

  Attributes:
    bad: numbers of the damaged images met so far.
  """

  def __init__(
    self,
    encoded: EncodedImages,
    num_classes: int,
    transform: Transform,
    *,
    max_bad: int = 0,
  ) -> None:
    """Reads nothing yet.

    Args:
      encoded: the image files.
      num_classes: labels must be below.
      transform: of an RGB image.
      max_bad: damaged images that are replaced; one more is an error.
    """
    self.bad: set[int] = set()
    self._encoded = encoded
    self._num_classes = num_classes
    self._transform = transform
    # If all are bad, none is left to take the place.
    self._max_bad = min(max_bad, len(encoded) - 1)
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return len(self._encoded)

  def __getitem__(self, index: int) -> sources.Record:
    return self._decode(index)

  def in_memory(self) -> sources.InMemory:
    """The same source, decoded once."""

    def read_all() -> list[sources.Record]:
      try:
        encoded = list(self._encoded.read_all())
      except DamagedError:  # which one, is found out one by one
        return [self[index] for index in range(len(self))]
      return [self._decode(index, image) for index, image in enumerate(encoded)]

    return sources.InMemory(len(self), read_all)

  def _decode(
    self, index: int, encoded: EncodedImage | None = None
  ) -> sources.Record:
    while True:
      try:
        encoded = encoded or self._encoded[index]
        image = _decode_image(encoded.data)
      except DamagedError as error:
        self._count_bad(index, error)
        index, encoded = (index + 1) % len(self), None
        continue
      if not 0 <= encoded.label < self._num_classes:
        raise errors.InputError(
          f"{self._encoded.place(index)} has label {encoded.label}, but the "
          f"data set has classes 0 to {self._num_classes - 1}; prepare it again"
        )
      pixels = np.asarray(self._transform(image))
      return {"image": pixels, "label": encoded.label}

  def _count_bad(self, index: int, error: DamagedError) -> None:
    with self._lock:
      if index in self.bad:
        return
      self.bad.add(index)
      num_bad = len(self.bad)
    what = f"{self._encoded.place(index)} cannot be decoded ({error})"
    if num_bad > self._max_bad:
      found = (
        f"and so could {num_bad - 1} others not, of {len(self)}: the copy is "
        "damaged"
        if self._max_bad
        else "and no test image may be left out"
      )
      raise errors.InputError(f"{what}, {found}; copy it anew")
    warnings.warn(
      f"{what}; the next image takes its place. Damaged so far: {num_bad}, an "
      f"error beyond {self._max_bad}",
      stacklevel=2,
    )


def for_training(
  encoded: EncodedImages, num_classes: int, transform: Transform
) -> Records:
  """Records of which `MAX_BAD_SHARE`, at least `MIN_BAD`, may be damaged."""
  max_bad = max(MIN_BAD, int(MAX_BAD_SHARE * len(encoded)))
  return Records(encoded, num_classes, transform, max_bad=max_bad)


def for_test(
  encoded: EncodedImages, num_classes: int, transform: Transform
) -> Records:
  """Records of which none may be damaged."""
  return Records(encoded, num_classes, transform)


def _decode_image(data: bytes) -> Image.Image:
  try:
    return transforms.decode_image(data)
  except UnidentifiedImageError as error:
    # Its message shows where in memory the bytes are.
    raise DamagedError("not an image file") from error
  except transforms.DAMAGED as error:
    raise DamagedError(str(error)) from error

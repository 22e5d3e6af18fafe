"""Decoding of image files into records, and what replaces damaged ones.

Every image file that this package reads, of a folder, a record, a COCO data set
or a single one, goes through `read_file` and `open_image`.

A damaged training image is reported in a warning and replaced by the next good
one, so that an image stays a pure function of its number; a run of hours does
not end at one bad file of a million. Beyond `MAX_DAMAGED_SHARE` of a split the
copy itself is bad, which is an error. A damaged test image always is one: an
accuracy that leaves images out, or counts others twice, is not the accuracy.
"""

import io
import os
import struct
import threading
import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from etils import epath
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from pqf_jax import errors
from pqf_jax.data import sources

T = TypeVar("T", covariant=True)
# Pillow has readers of 40 more, one of which starts Ghostscript.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")
# Above this number Pillow warns of a decompression bomb.
MAX_PIXELS = 89_478_485
# The longer side of a phone's panorama.
MAX_SIDE = 2**14
# Resizing the shorter side to 256 pixels would make the longer one huge.
MAX_ASPECT = 100
# The largest image without compression and with 16 bits fits.
MAX_BYTES = 2**30
# Pillow's modes whose 0 is black (or no ink) and whose 255 is the opposite.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
# Of a split's images; every image of ImageNet can be decoded.
MAX_DAMAGED_SHARE = 0.001
# In a small split a few are no sign of a bad copy.
MIN_DAMAGED = 10

# Pillow raises these for files that are damaged, cut short or no images.
_DECODING_ERRORS = (
  OSError,
  SyntaxError,
  ValueError,
  EOFError,
  TypeError,
  LookupError,
  AssertionError,  # such as for a PNG without its palette
  struct.error,
  Image.DecompressionBombError,
)
_TURNS = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}


class DamagedError(Exception):
  """Stored bytes that cannot be read or decoded; the message says why."""


def read_file(path: epath.PathLike) -> bytes:
  """Reads an image file.

  Raises:
    DamagedError: it is missing, larger than `MAX_BYTES` or not a regular file;
      a pipe, for one, would be waited for.
  """
  file = epath.Path(path)
  try:
    # To epath a pipe is a file too.
    is_remote = "://" in os.fspath(file)
    if not (file.is_file() if is_remote else os.path.isfile(file)):
      raise DamagedError(
        "it is not a regular file" if file.exists() else "it is missing"
      )
    num_bytes = file.stat().length
    if num_bytes > MAX_BYTES:
      raise DamagedError(f"it has {num_bytes} bytes, more than {MAX_BYTES}")
    return file.read_bytes()
  except OSError as error:
    raise DamagedError(str(error)) from error


def open_image(data: bytes, *, annotated: bool = False) -> Image.Image:
  """Decodes a file of one of the `FORMATS` to an RGB image with 8 bits.

  - Gray, CMYK and palettes are converted, as torchvision does. 16 bits of PNG
    and PPM are scaled to 8. Pixels without a defined range are refused: floats,
    and whole numbers of more than 8 bits in TIFF.
  - The EXIF orientation is applied, as viewers do; torchvision ignores it.
  - Transparent pixels are laid on white; torchvision shows the hidden colors.
  - Size and shape are checked before anything is decoded: `MAX_SIDE`,
    `MAX_ASPECT`, `MAX_PIXELS`.
  - Of several frames or pages the first is taken.

  Args:
    data: content of the file.
    annotated: whether annotations refer to places in the image. Some tools
      write them for the pixels as stored (pycocotools and torchvision's
      CocoDetection ignore the EXIF orientation), others for the turned image,
      and sizes do not show which: an orientation other than 1 is refused.

  Raises:
    DamagedError: the bytes cannot be decoded, or are an image that is refused.
  """
  try:
    file = _open(data)
    # Pillow turns a TIFF itself when it is loaded.
    turned = _orientation(file) if file.format == "TIFF" else 1
    file.load()
    orientation = _orientation(file)
    image = _to_rgb(file)
  except _DECODING_ERRORS as error:
    raise _damaged(error) from error
  if annotated and (turned, orientation) != (1, 1):
    raise DamagedError(
      f"its EXIF orientation is {max(turned, orientation)}, so that the "
      "annotations may be for the pixels as stored or as shown; turn the "
      "pixels and remove the tag"
    )
  turn = _TURNS.get(orientation)
  return image.transpose(turn) if turn is not None else image


def read_size(data: bytes) -> tuple[int, int]:
  """Reads width and height from the header of a file that `open_image` takes.

  They are those of the pixels as stored, before the EXIF orientation.

  Raises:
    DamagedError: see `open_image`.
  """
  try:
    return _open(data).size
  except _DECODING_ERRORS as error:
    raise _damaged(error) from error


def _open(data: bytes) -> ImageFile.ImageFile:
  file = Image.open(io.BytesIO(data), formats=FORMATS)
  _check_header(file)
  return file


def _damaged(error: Exception) -> DamagedError:
  if isinstance(error, UnidentifiedImageError):
    # Its message shows where in memory the bytes are.
    return DamagedError(f"it is not an image file ({', '.join(FORMATS)})")
  return DamagedError(str(error) or type(error).__name__)


def _check_header(image: ImageFile.ImageFile) -> None:
  """Refuses what is too large, and pixels whose range is not known."""
  width, height = image.size
  short, long = sorted(image.size)
  if (
    short < 1
    or long > min(MAX_SIDE, MAX_ASPECT * short)
    or width * height > MAX_PIXELS
  ):
    raise DamagedError(
      f"it has {width} x {height} pixels (width x height), but must have at "
      f"most {MAX_PIXELS}, {MAX_SIDE} a side, and sides of at most "
      f"{MAX_ASPECT}:1; crop it or scale it down"
    )
  if image.mode not in MODES and not _is_16_bits(image):
    raise DamagedError(
      f"its pixels are of Pillow's mode {image.mode} in {image.format}, whose "
      "black and white are not defined; save it with 8 bits a channel"
    )
  # Pillow compares the color before it scales the pixels, or after.
  is_scaled = ";" in str(image.tile[0][3]) if image.tile else False
  if is_scaled and image.mode != "P" and "transparency" in image.info:
    raise DamagedError(
      "it names a transparent color (tRNS) and has not 8 bits a channel; save "
      "it with 8 bits a channel"
    )


def _is_16_bits(image: ImageFile.ImageFile) -> bool:
  # In TIFF 12 bits look the same, and are not scaled to 16.
  return image.format in ("PNG", "PPM") and image.mode.startswith("I")


def _orientation(image: Image.Image) -> int:
  """Returns the EXIF orientation; 1 if it is missing, unknown or damaged."""
  try:
    value = image.getexif().get(ExifTags.Base.Orientation)
  except _DECODING_ERRORS:
    return 1
  return value if value in _TURNS else 1


def _to_rgb(file: ImageFile.ImageFile) -> Image.Image:
  if _is_16_bits(file):
    # The upper 8 bits, as Pillow takes of 16-bit RGB.
    gray = Image.fromarray((np.asarray(file) >> 8).astype(np.uint8))
    return gray.convert("RGB")
  if file.has_transparency_data:
    image = file.convert("RGBA")
    opaque = Image.new("RGB", image.size, "white")
    opaque.paste(image, mask=image.getchannel("A"))
    return opaque
  # Conversion would copy the pixels once more.
  return file if file.mode == "RGB" else file.convert("RGB")


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

  @property
  def split_names(self) -> Sequence[str]:
    """The splits that there are."""

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
    transform: sources.Transform,
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
        image = open_image(encoded.data)
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
        f"{problem}, and the accuracy needs every test image; copy it again or "
        "replace it"
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
  encoded: EncodedImages, num_classes: int, transform: sources.Transform
) -> Records:
  """Returns records that replace damaged images.

  `MAX_DAMAGED_SHARE` of the images may be damaged, and at least `MIN_DAMAGED`.
  """
  max_damaged = max(MIN_DAMAGED, int(MAX_DAMAGED_SHARE * len(encoded)))
  return Records(encoded, num_classes, transform, max_damaged=max_damaged)

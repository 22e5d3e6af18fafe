"""CIFAR-10 as its authors offer it: an archive of six batches, or its folder.

The batches of `cifar-10-python.tar.gz` are pickles. They are unpickled without
any class but three stand-ins for NumPy's, so that no file can run code.
`cifar-10-binary.tar.gz` has plain bytes.
"""

import gzip
import io
import pathlib
import pickle
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, NamedTuple, cast

import numpy as np

from pqf_jax import errors
from pqf_jax.data import decoding

NUM_CLASSES = 10
SIDE = 32
NUM_VALUES = 3 * SIDE * SIDE
TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST = ("test_batch",)
# Twice what a batch of 10,000 images has, and what an archive unpacks to.
MAX_BYTES = 2**26
MAX_UNPACKED = 2**29

Batch = tuple[np.ndarray, np.ndarray]
"""Pixels uint8 [N, 3072], first all red ones, and labels [N]."""


class Images(decoding.EncodedImages):
  """The images of some batches; each is given as a PPM file."""

  def __init__(self, batches: Sequence[Batch], where: str) -> None:
    pixels, labels = zip(*batches, strict=True)
    self._pixels = np.concatenate(pixels)
    self._labels = np.concatenate(labels).tolist()
    self._where = where

  def __len__(self) -> int:
    return len(self._pixels)

  def __getitem__(self, index: int) -> decoding.EncodedImage:
    colors = self._pixels[index].reshape(3, -1).T
    data = b"P6 %d %d 255\n" % (SIDE, SIDE) + colors.tobytes()
    return decoding.EncodedImage(data, self._labels[index])

  def place(self, index: int) -> str:
    """Returns the number of an image in its split."""
    return f"image {index} of {self._where}"


class Batches(decoding.EncodedDataset):
  """The six batches in a folder, or in an archive there."""

  def __init__(self, top: pathlib.Path) -> None:
    """Reads all batches.

    Args:
      top: holds one of the archives, or what was unpacked from it.

    Raises:
      InputError: a batch is missing or damaged.
    """
    place, form = next(_places(top))
    files = _read(place, form)
    self._splits = {}
    for split, names in (("train", TRAIN), ("test", TEST)):
      batches = [
        _decode(files[name], form, f"{name} of {place}") for name in names
      ]
      self._splits[split] = Images(batches, f"{split} in {place}")

  @property
  def num_classes(self) -> int:
    """The ten classes."""
    return NUM_CLASSES

  @property
  def split_names(self) -> tuple[str, ...]:
    """Both splits."""
    return tuple(self._splits)

  def split(self, name: str) -> Images:
    """Returns the images of `train` or `test`."""
    return self._splits[name]


def is_in(folder: pathlib.Path) -> bool:
  """Whether a folder holds an archive, or the folder of one."""
  return any(True for _ in _places(folder))


def _from_pickle(data: bytes) -> Batch:
  """Reads a batch that Python 2 pickled, with NumPy's array inside.

  Raises:
    pickle.UnpicklingError: it asks for anything else; others where the bytes
      are damaged.
  """

  # Made anew for every file, since a pickle may set their attributes.
  class Array:
    def __setstate__(self, state: Any) -> None:
      _, self.shape, self.dtype, self.is_fortran, self.content = state

  class Type:
    def __init__(self, code: bytes, *flags: Any) -> None:
      self.code = code

    def __setstate__(self, state: Any) -> None:
      pass

  allowed: dict[str, Any] = {
    "numpy.core.multiarray._reconstruct": lambda *arguments: Array(),
    "numpy.ndarray": Array,
    "numpy.dtype": Type,
  }

  class Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
      asked = f"{module}.{name}"
      if asked not in allowed:
        raise pickle.UnpicklingError(f"it asks for {asked}")
      return allowed[asked]

  content = Unpickler(io.BytesIO(data), encoding="bytes").load()
  array = content[b"data"]
  if array.dtype.code != b"u1" or array.is_fortran:
    raise ValueError("its data are no rows of bytes")
  pixels = np.frombuffer(array.content, np.uint8).reshape(array.shape)
  return pixels, np.array(content[b"labels"], np.int64)


def _from_bytes(data: bytes) -> Batch:
  """Reads a batch in which every image comes after its label."""
  rows = np.frombuffer(data, np.uint8).reshape(-1, 1 + NUM_VALUES)
  return rows[:, 1:], rows[:, 0].astype(np.int64)


class Form(NamedTuple):
  """One of the authors' archives.

  Attributes:
    archive: its file name.
    folder: where the batches are inside of it.
    suffix: of the files.
    read: a file -> batch.
  """

  archive: str
  folder: str
  suffix: str
  read: Callable[[bytes], Batch]


FORMS = (
  Form("cifar-10-python.tar.gz", "cifar-10-batches-py", "", _from_pickle),
  Form("cifar-10-binary.tar.gz", "cifar-10-batches-bin", ".bin", _from_bytes),
)


def _places(folder: pathlib.Path) -> Iterator[tuple[pathlib.Path, Form]]:
  for form in FORMS:
    if (folder / form.folder).is_dir():
      yield folder / form.folder, form
    if (folder / form.archive).is_file():
      yield folder / form.archive, form


def _read(place: pathlib.Path, form: Form) -> dict[str, bytes]:
  """Returns {name without suffix: content} of all batches.

  Raises:
    InputError: one is missing, or the archive is damaged.
  """
  wanted = {f"{name}{form.suffix}": name for name in (*TRAIN, *TEST)}
  content: dict[str, bytes] = {}
  if place.is_dir():
    for file, name in wanted.items():
      path = place / file
      if path.is_file() and path.stat().st_size <= MAX_BYTES:
        content[name] = path.read_bytes()
  else:
    try:
      for member, data in _members(place):
        folder, _, file = member.removeprefix("./").rpartition("/")
        if folder == form.folder and file in wanted:
          content[wanted[file]] = data
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
      raise errors.InputError(
        f"{place} is damaged ({error}); download it again"
      ) from error
  missing = [file for file, name in wanted.items() if name not in content]
  if missing:
    raise errors.InputError(
      f"{place} lacks {', '.join(missing)} (files of at most {MAX_BYTES} "
      f"bytes); download {form.archive} again"
    )
  return content


class _Unpacked:
  """A compressed stream that ends with an error before it fills the memory."""

  def __init__(self, stream: gzip.GzipFile) -> None:
    self._stream = stream
    self._left = MAX_UNPACKED

  def read(self, size: int) -> bytes:
    data = self._stream.read(size)
    self._left -= len(data)
    if self._left < 0:
      raise tarfile.TarError(f"it unpacks to more than {MAX_UNPACKED} bytes")
    return data


def _members(path: pathlib.Path) -> Iterator[tuple[str, bytes]]:
  """Yields names and contents in the order of the archive.

  To go back would be to decompress it again.
  """
  with gzip.open(path) as stream:
    unpacked = _Unpacked(stream)
    # It only reads, where mypy's stubs ask for a whole file.
    with tarfile.open(fileobj=cast(IO[bytes], unpacked), mode="r|") as archive:
      for member in archive:
        file = archive.extractfile(member) if member.isfile() else None
        if file is not None and member.size <= MAX_BYTES:
          yield member.name, file.read()
    while unpacked.read(2**20):  # the checksum is at the end
      pass


def _decode(data: bytes, form: Form, where: str) -> Batch:
  """Returns a batch, checked.

  Raises:
    InputError: it is damaged.
  """
  try:
    pixels, labels = form.read(data)
  except Exception as error:  # A damaged pickle may raise anything.
    raise _damaged(where, form, str(error) or type(error).__name__) from error
  if pixels.ndim != 2 or pixels.shape[1] != NUM_VALUES or not len(pixels):
    raise _damaged(where, form, f"its images are of shape {pixels.shape}")
  if labels.shape != pixels.shape[:1] or not (
    labels.min() >= 0 and labels.max() < NUM_CLASSES
  ):
    raise _damaged(
      where, form, f"it has not one label below {NUM_CLASSES} for each image"
    )
  return pixels, labels


def _damaged(where: str, form: Form, why: str) -> errors.InputError:
  return errors.InputError(
    f"{where} is damaged: {why}; download {form.archive} again"
  )

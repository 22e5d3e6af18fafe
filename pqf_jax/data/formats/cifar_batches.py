"""CIFAR-10 as its authors offer it: an archive of six batches, or its folder.

The batches of `cifar-10-python.tar.gz` are pickles, which are read as plain
data, so that no file can run code; `cifar-10-binary.tar.gz` has plain bytes.
"""

import gzip
import pathlib
import pickle
import pickletools
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
# A batch has a label and the name of a file for every image: 31,000.
MAX_OPCODES = 2**18
MAX_WHY = 200

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


class _Call:
  """What a pickle asks to be called, and is not.

  Attributes:
    name: module and function.
    arguments: of the call.
    state: of its result.
  """

  def __init__(self, name: Any, arguments: Any) -> None:
    self.name, self.arguments, self.state = name, arguments, None


_MARK = object()


def _read_pickle(data: bytes) -> Any:
  """Returns what Python 2 pickled; a `_Call` stands for every object.

  Python's own unpickler runs no code either where it finds no class, but ten
  bytes can make it fill the memory, and a hundred can keep it busy for ever.

  Raises:
    pickle.UnpicklingError: there is more in it than such a batch needs; others
      where the bytes are damaged.
  """
  stack: list[Any] = []
  memo: dict[int, Any] = {}

  def pop_items() -> list[Any]:
    items = []
    while (item := stack.pop()) is not _MARK:
      items.append(item)
    return items[::-1]

  opcodes: Iterator[Any] = pickletools.genops(data)
  for number, (opcode, argument, _) in enumerate(opcodes):
    if number == MAX_OPCODES:
      raise pickle.UnpicklingError(f"it has more than {MAX_OPCODES} opcodes")
    match opcode.name:
      case "PROTO" | "STOP":
        pass
      case "BINPUT" | "LONG_BINPUT":
        memo[argument] = stack[-1]
      case "BINGET" | "LONG_BINGET":
        stack.append(memo[argument])
      case "MARK":
        stack.append(_MARK)
      case "NONE" | "NEWFALSE" | "NEWTRUE":
        constants = {"NONE": None, "NEWFALSE": False, "NEWTRUE": True}
        stack.append(constants[opcode.name])
      case "BININT" | "BININT1" | "BININT2" | "GLOBAL":
        stack.append(argument)
      case "BINSTRING" | "SHORT_BINSTRING":
        stack.append(argument.encode("latin-1"))
      case "EMPTY_DICT":
        stack.append({})
      case "EMPTY_LIST":
        stack.append([])
      case "TUPLE":
        stack.append(tuple(pop_items()))
      case "TUPLE1" | "TUPLE2" | "TUPLE3":
        length = int(opcode.name[-1])
        stack[-length:] = [tuple(stack[-length:])]
      case "APPEND" | "APPENDS":
        items = pop_items() if opcode.name == "APPENDS" else [stack.pop()]
        stack[-1].extend(items)
      case "SETITEM" | "SETITEMS":
        is_one = opcode.name == "SETITEM"
        items = [stack.pop(-2), stack.pop()] if is_one else pop_items()
        if not all(isinstance(key, bytes) for key in items[::2]):
          raise pickle.UnpicklingError("it has keys that are no names")
        stack[-1].update(zip(items[::2], items[1::2], strict=True))
      case "REDUCE":
        arguments = stack.pop()
        stack.append(_Call(stack.pop(), arguments))
      case "BUILD":
        state = stack.pop()
        stack[-1].state = state
      case name:
        raise pickle.UnpicklingError(f"it has an opcode {name}")
  return stack.pop()


def _from_pickle(data: bytes) -> Batch:
  """Reads a batch that Python 2 pickled, with NumPy's array inside.

  Raises:
    pickle.UnpicklingError: see `_read_pickle`.
    ValueError: it has something else in the array's place; others too.
  """
  content = _read_pickle(data)
  array = content[b"data"]
  _, shape, dtype, is_fortran, pixels = array.state
  if (
    array.name != "numpy.core.multiarray _reconstruct"
    or dtype.name != "numpy dtype"
    or dtype.arguments[0] != b"u1"
    or is_fortran is not False
  ):
    raise ValueError("its data are no rows of bytes")
  # Of nested lists np.array would take any time.
  labels = np.fromiter(content[b"labels"], np.int64)
  return np.frombuffer(pixels, np.uint8).reshape(shape), labels


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
    why = str(error) or type(error).__name__  # it may show all of a line
    raise _damaged(where, form, why[:MAX_WHY]) from error
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

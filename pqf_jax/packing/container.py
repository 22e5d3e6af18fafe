"""The container of a packed file: safetensors, read without a copy.

8 bytes with the length of a JSON header; the header, {name: {dtype, shape,
data_offsets}} and strings in `__metadata__`; the bytes of the buffers. The
library `safetensors` copies every buffer before a program can refuse it; here
a buffer is a view of the file's bytes.
"""

import json
import math
import mmap
import reprlib
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from pqf_jax import errors

TYPES: dict[str, np.dtype[Any]] = {
  name: np.dtype(dtype)
  for name, dtype in {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "U32": np.uint32,
    "I32": np.int32,
    "F32": np.float32,
    "U64": np.uint64,
    "I64": np.int64,
    "F64": np.float64,
  }.items()
}
_NAMES = {dtype: name for name, dtype in TYPES.items()}
METADATA = "__metadata__"
LENGTH_BYTES = 8
# 4 MiB describe 25,000 variables; in memory JSON takes up to twenty times that.
MAX_HEADER = 1 << 22
MAX_RANK = 64  # of NumPy
# JAX addresses no more entries of one array.
MAX_SIZE = 1 << 40


class Content(NamedTuple):
  """What a safetensors file holds.

  Attributes:
    metadata: {name: text}.
    buffers: {name: array}, read-only views of the file's bytes.
  """

  metadata: dict[str, str]
  buffers: dict[str, np.ndarray]


def write(buffers: Mapping[str, np.ndarray], metadata: dict[str, str]) -> bytes:
  """Returns the bytes of a safetensors file.

  Raises:
    InputError: the names of all buffers are too long together.
  """
  # The widest type first, so that every buffer begins at a multiple of its own.
  names = sorted(buffers, key=lambda name: (-buffers[name].itemsize, name))
  header: dict[str, Any] = {METADATA: metadata}
  end = 0
  for name in names:
    buffer, begin = buffers[name], end
    end += buffer.nbytes
    header[name] = {
      "dtype": _NAMES[buffer.dtype],
      "shape": buffer.shape,
      "data_offsets": [begin, end],
    }
  text = json.dumps(header, separators=(",", ":")).encode()
  if len(text) > MAX_HEADER:
    raise errors.InputError(
      f"the names of {len(buffers):,} variables take {len(text):,} bytes; a "
      f"packed file holds {MAX_HEADER:,}: join variables, or shorten names"
    )
  text += b" " * (-len(text) % LENGTH_BYTES)
  contiguous = (np.ascontiguousarray(buffers[name]) for name in names)
  content = (array.reshape(-1).view(np.uint8).data for array in contiguous)
  return b"".join([len(text).to_bytes(LENGTH_BYTES, "little"), text, *content])


def read(stream: BinaryIO, size: int, *, mapped: bool = False) -> Content:
  """Reads a safetensors file; its content only when its header fits.

  Args:
    stream: at the beginning of the file.
    size: bytes of the file.
    mapped: whether buffers are the file's own pages, without a copy. They
      change with a file that is written in place, so it is for callers that
      drop them at once.

  Raises:
    InputError: it is cut off, longer than its header says, or not safetensors.
  """
  metadata, entries, size = _read_header(stream, size)
  buffers = {name: _Entry.parse(name, entries[name]) for name in entries}
  end = 0
  for name, entry in sorted(buffers.items(), key=lambda item: item[1].span):
    if entry.span[0] != end:
      raise _refusal(f"buffer {name!r} does not begin where another ends")
    end = entry.span[1]
  if end != size:
    raise _refusal(f"its buffers take {end:,} bytes, but {size:,} follow")
  data = _map(stream) if mapped else stream.read(size)
  if len(data) != size:
    raise _refusal(f"only {len(data):,} of {size:,} bytes could be read")
  views = {name: entry.view(data) for name, entry in buffers.items()}
  return Content(metadata, views)


def _map(stream: BinaryIO) -> memoryview | bytes:
  """Returns the rest of a file, as its own pages where storage has them."""
  try:
    pages = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
  except OSError:
    return stream.read()
  return memoryview(pages)[stream.tell() :]


def read_metadata(stream: BinaryIO, size: int) -> dict[str, str]:
  """Reads only the metadata of a safetensors file; see `read`."""
  return _read_header(stream, size)[0]


def _read_header(
  stream: BinaryIO, size: int
) -> tuple[dict[str, str], dict[str, Any], int]:
  """Returns metadata, what it says of each buffer, and the bytes after it."""
  length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
  rest = size - LENGTH_BYTES - length
  if rest < 0 or length > MAX_HEADER:
    raise _refusal(f"{size:,} bytes cannot have a header of {length:,}")
  try:
    entries = read_json(stream.read(length).decode())
    # JSON can spell halves of characters, which no text can hold.
    "".join(entries).encode()
  except (ValueError, TypeError) as error:
    raise _refusal(f"its header is not JSON ({error})") from error
  metadata = entries.pop(METADATA, {}) if isinstance(entries, dict) else None
  if not isinstance(metadata, dict) or not all(
    isinstance(value, str) for value in metadata.values()
  ):
    raise _refusal("its header is not an object with strings in __metadata__")
  return metadata, entries, rest


def read_json(text: str) -> Any:
  """Parses JSON in which no name comes twice.

  Raises:
    ValueError: it is not such JSON, or nested too deeply.
  """
  try:
    return json.loads(text, object_pairs_hook=_unique)
  except RecursionError as error:
    raise ValueError("it is nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) != len(pairs):
    raise ValueError("a name comes twice")
  return found


def _refusal(reason: str) -> errors.InputError:
  return errors.InputError(f"it is truncated or not safetensors: {reason}")


class _Entry(NamedTuple):
  """What the header says of one buffer."""

  dtype: np.dtype[Any]
  shape: tuple[int, ...]
  span: tuple[int, int]

  @classmethod
  def parse(cls, name: str, value: Any) -> "_Entry":
    where = f"buffer {name[:80]!r}"
    if not isinstance(value, dict) or value.keys() != {
      "dtype",
      "shape",
      "data_offsets",
    }:
      raise _refusal(f"{where} must have dtype, shape and data_offsets")
    given = value["dtype"]
    dtype = TYPES.get(given) if isinstance(given, str) else None
    if dtype is None:
      raise errors.InputError(
        f"{where} has the dtype {reprlib.repr(given)}, which pqf_jax "
        f"does not read; known are {', '.join(TYPES)}"
      )
    shape, span = value["shape"], value["data_offsets"]
    for numbers in (shape, span):
      if not isinstance(numbers, list) or not all(
        type(n) is int and 0 <= n <= MAX_SIZE for n in numbers
      ):
        raise _refusal(f"{where} has a shape or offsets that are no sizes")
    if len(shape) > MAX_RANK or math.prod(max(n, 1) for n in shape) > MAX_SIZE:
      raise _refusal(f"{where} has a shape that no array can have")
    needed = math.prod(shape) * dtype.itemsize
    if len(span) != 2 or span[1] - span[0] != needed:
      raise _refusal(f"{where} needs {needed:,} bytes, but has other offsets")
    return cls(dtype, tuple(shape), (span[0], span[1]))

  def view(self, data: bytes | memoryview) -> np.ndarray:
    count = math.prod(self.shape)
    flat = np.frombuffer(data, self.dtype, count, self.span[0])
    return flat.reshape(self.shape)

"""The container of a packed file: safetensors, read without a copy.

8 bytes with the length of a JSON header; the header, {name: {dtype, shape,
data_offsets}} and strings in `__metadata__`; the bytes of the buffers. The
library `safetensors` copies every buffer before a program can refuse it; here
a buffer is a view of the file's bytes.
"""

import json
import math
import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple

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
# 16 MiB describe 100,000 variables; a larger header is no header.
MAX_HEADER = 1 << 24
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
  """Returns the bytes of a safetensors file."""
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
  text += b" " * (-len(text) % LENGTH_BYTES)
  contiguous = (np.ascontiguousarray(buffers[name]) for name in names)
  content = (array.reshape(-1).view(np.uint8).data for array in contiguous)
  return b"".join([len(text).to_bytes(LENGTH_BYTES, "little"), text, *content])


def read(data: bytes) -> Content:
  """Reads a safetensors file from its bytes.

  Raises:
    InputError: it is cut off, longer than its header says, or not safetensors.
  """
  length = header_length(data, len(data))
  start = LENGTH_BYTES + length
  entries = read_header(data[LENGTH_BYTES:start])
  metadata = entries.pop(METADATA, {})
  buffers = {name: _Entry.parse(name, entries[name]) for name in entries}
  end = 0
  for name, entry in sorted(buffers.items(), key=lambda item: item[1].span):
    if entry.span[0] != end:
      raise _refusal(f"buffer {name!r} does not begin where another ends")
    end = entry.span[1]
  if end != len(data) - start:
    raise _refusal(
      f"its buffers take {end:,} bytes, but {len(data) - start:,} follow"
    )
  return Content(
    metadata, {name: entry.view(data, start) for name, entry in buffers.items()}
  )


def header_length(data: bytes, size: int) -> int:
  """Returns the bytes of the JSON header.

  Args:
    data: the first bytes of the file, or all.
    size: bytes of the whole file.

  Raises:
    InputError: the file cannot be so long, or the header is too large.
  """
  length = int.from_bytes(data[:LENGTH_BYTES], "little")
  if size < LENGTH_BYTES or length > min(size - LENGTH_BYTES, MAX_HEADER):
    raise _refusal(f"{size:,} bytes cannot have a header of {length:,}")
  return length


def read_header(text: bytes) -> dict[str, Any]:
  """Parses the JSON header of a file.

  Raises:
    InputError: it is not an object of objects, or its metadata are not strings.
  """
  try:
    entries = read_json(text.decode())
    # JSON can spell halves of characters, which no text can hold.
    "".join(entries).encode()
  except (ValueError, TypeError) as error:
    raise _refusal(f"its header is not JSON ({error})") from error
  metadata = entries.get(METADATA, {}) if isinstance(entries, dict) else None
  if not isinstance(metadata, dict) or not all(
    isinstance(value, str) for value in metadata.values()
  ):
    raise _refusal("its header is not an object with strings in __metadata__")
  return dict(entries)


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
    if len(shape) > 32 or math.prod(max(n, 1) for n in shape) > MAX_SIZE:
      raise _refusal(f"{where} has a shape that no array can have")
    needed = math.prod(shape) * dtype.itemsize
    if len(span) != 2 or span[1] - span[0] != needed:
      raise _refusal(f"{where} needs {needed:,} bytes, but has other offsets")
    return cls(dtype, tuple(shape), (span[0], span[1]))

  def view(self, data: bytes, start: int) -> np.ndarray:
    count = math.prod(self.shape)
    flat = np.frombuffer(data, self.dtype, count, start + self.span[0])
    return flat.reshape(self.shape)

"""The library `safetensors` is the oracle of the container."""

import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from pqf_jax import errors
from pqf_jax.packing import container

BUFFERS = {
  "a": np.arange(6, dtype=np.float32).reshape(2, 3),
  "b/ü": np.array(True),
  "c": np.empty((0, 4), np.float64),
  "d": np.arange(3, dtype=np.uint16),
}


def assert_equal(left, right):
  assert left.keys() == right.keys()
  for name, array in left.items():
    assert array.dtype == right[name].dtype
    np.testing.assert_array_equal(array, right[name])


def read(data):
  return container.read(io.BytesIO(data), len(data))


def test_files_are_those_of_the_library():
  data = container.write(BUFFERS, {"x": "y"})
  assert_equal(safetensors.numpy.load(data), BUFFERS)
  metadata, buffers = read(safetensors.numpy.save(BUFFERS, {"x": "y"}))
  assert metadata == {"x": "y"}
  assert_equal(buffers, BUFFERS)
  assert_equal(read(data).buffers, BUFFERS)


def test_buffers_begin_at_multiples_of_their_type():
  data = container.write(BUFFERS, {})
  length = int.from_bytes(data[:8], "little")
  assert length % 8 == 0
  for name, entry in json.loads(data[8 : 8 + length]).items():
    if name != container.METADATA:
      assert entry["data_offsets"][0] % BUFFERS[name].itemsize == 0


def test_types_that_numpy_lacks_come_back():
  # Not contiguous either.
  buffers = {"a": np.arange(4).astype(jnp.bfloat16)[::-1]}
  assert_equal(read(container.write(buffers, {})).buffers, buffers)


def file(header, content=bytes(8)):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return len(text).to_bytes(8, "little") + text + content


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
  return {
    "dtype": dtype,
    "shape": list(shape),
    "data_offsets": list(offsets),
  }


@pytest.mark.parametrize(
  ("data", "message"),
  [
    (b"", "0 bytes cannot have a header"),
    ((5 << 20).to_bytes(8, "little") + bytes(5 << 20), "header of 5,2"),
    (b"1234567", "7 bytes cannot"),
    (bytes([255] * 20), "cannot have a header of 18,4"),
    (file(b"\xff{}"), "not JSON"),
    (file(b'{"a": {}, "a": {}}'), "a name comes twice"),
    (file(b"[" * 100_000), "nested too deeply"),
    (file(b'{"a": ' * 100_000), "nested too deeply"),
    (file(b'{"\\ud800": 1}'), "not JSON"),
    (file(b"5"), "header"),
    (file([]), "not an object"),
    (file({"__metadata__": {"a": 1}}), "strings in __metadata__"),
    (file({"__metadata__": 1}), "strings in __metadata__"),
    (file({"a": 5}), "'a' must have dtype, shape"),
    (file({"a": entry() | {"more": 1}}), "'a' must have dtype, shape"),
    (file({"a": entry("F8_E4M3")}), "dtype 'F8_E4M3'"),
    (file({"a": entry([])}), r"dtype \[\]"),
    (file({"a": entry(shape=[-2])}), "no sizes"),
    (file({"a": entry(shape=[2.0])}), "no sizes"),
    (file({"a": entry(shape=[True, 2])}), "no sizes"),
    (file({"a": entry(shape=[1 << 80])}), "no sizes"),
    (file({"a": entry(shape=[0, 1 << 39, 4], offsets=(0, 0))}), "no array can"),
    (file({"a": entry(shape=[1] * 65)}), "no array can"),
    (file({"a": entry(shape=[3])}), "needs 12 bytes"),
    (file({"a": entry(offsets=(8, 0))}), "needs 8 bytes"),
    (file({"a": entry(offsets=(0, 8, 8))}), "needs 8 bytes"),
    (file({"a": entry(offsets=(1, 9))}), "does not begin where another ends"),
    (file({"a": entry(), "b": entry()}), "does not begin where"),
    (file({"a": entry()}, bytes(7)), "take 8 bytes, but 7 follow"),
    (file({"a": entry()}, bytes(9)), "take 8 bytes, but 9 follow"),
  ],
)
def test_what_is_no_such_file_is_refused(data, message):
  with pytest.raises(errors.InputError, match=message):
    read(data)


def test_the_content_is_read_only_if_the_header_fits():
  stream = io.BytesIO(file({"a": entry()}))
  with pytest.raises(errors.InputError, match="take 8 bytes, but 1,0"):
    container.read(stream, 1 << 40)
  assert stream.tell() < len(stream.getvalue())
  with pytest.raises(errors.InputError, match="only 3 of 8 bytes"):
    cut = file({"a": entry()})
    container.read(io.BytesIO(cut[:-5]), len(cut))


def test_mapped_buffers_are_those_that_are_read(tmp_path):
  data = container.write(BUFFERS, {"x": "y"})
  path = tmp_path / "file"
  path.write_bytes(data)
  with open(path, "rb") as stream:
    mapped = container.read(stream, len(data), mapped=True)
  # What is no file on a disk has no pages, and is read.
  unmapped = container.read(io.BytesIO(data), len(data), mapped=True)
  for metadata, buffers in mapped, unmapped:
    assert metadata == {"x": "y"}
    assert_equal(buffers, BUFFERS)
    assert not any(array.flags.writeable for array in buffers.values())

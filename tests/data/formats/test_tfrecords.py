import os
import pathlib
import struct

import grain
import numpy as np
import pytest

from pqf_jax import errors
from pqf_jax.data import decoding
from pqf_jax.data.formats import tfds_folder, tfrecords
from tests.data import tiny_tfds

RECORDS = [bytes([i]) * size for i, size in enumerate((5, 0, 300, 1, 70_000))]


@pytest.fixture
def file(tmp_path: pathlib.Path) -> pathlib.Path:
  path = tmp_path / "x.tfrecord-00000-of-00001"
  path.write_bytes(b"".join(map(tiny_tfds.framed, RECORDS)))
  return path


def refusal(path: pathlib.Path, count: int = len(RECORDS)) -> str:
  with pytest.raises(errors.InputError) as caught:
    tfrecords.TFRecords([str(path)], [count])
  return str(caught.value)


def test_the_sum_of_known_bytes():
  # RFC 3720, B.4: 32 bytes of zeros, of ones, and 0 to 31; and the usual one.
  for data, crc in (
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (b"123456789", 0xE3069283),
  ):
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32
    assert tfrecords.masked_crc32c(data) == struct.pack("<I", masked)
    assert tiny_tfds.crc32c(data) == crc


def test_a_changed_byte_anywhere_is_never_read_as_data(file):
  content = file.read_bytes()
  rng = np.random.default_rng(0)
  places = [*range(370), *rng.integers(370, len(content), 30).tolist()]
  starts = np.cumsum([0] + [len(record) + 16 for record in RECORDS])
  for place in places:
    changed = bytearray(content)
    changed[place] ^= 1 << rng.integers(8)
    file.write_bytes(changed)
    damaged = int(np.searchsorted(starts, place, side="right")) - 1
    if place - starts[damaged] < tfrecords.HEADER_BYTES:
      assert f"damaged at byte {starts[damaged]}" in refusal(file)
      continue
    records = tfrecords.TFRecords([str(file)], [len(RECORDS)])
    for index, record in enumerate(RECORDS):
      if index != damaged:
        assert records[index] == record
    with pytest.raises(decoding.DamagedError, match="checksum of the record"):
      records[damaged]


def test_records_are_those_that_grain_reads(file):
  """Grain reads one after the other, and does so in C++."""
  records = tfrecords.TFRecords([str(file)], [len(RECORDS)])
  read = list(grain.experimental.TFRecordIterDataset(str(file)))
  assert [records[i] for i in range(len(records))] == read == RECORDS


def test_any_cut_into_files_gives_the_same_records(tmp_path):
  for cuts in ([0, 5], [0, 2, 5], [0, 1, 1, 4, 5], [0, 0, 5, 5]):
    paths, lengths = [], []
    for i, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False)):
      path = tmp_path / f"{len(cuts)}-{i}"
      path.write_bytes(b"".join(map(tiny_tfds.framed, RECORDS[start:stop])))
      paths.append(str(path))
      lengths.append(stop - start)
    records = tfrecords.TFRecords(paths, lengths)
    assert [records[i] for i in reversed(range(5))] == RECORDS[::-1]
    examples = tfds_folder.Examples(tfrecords.TFRecords, paths, lengths)
    assert [examples.place(i) for i in range(5)] == [
      f"record {record} of {path}"
      for path, length in zip(paths, lengths, strict=True)
      for record in range(length)
    ]


@pytest.mark.parametrize(
  "missing", [1, 3, 4, 5, 50_000, 70_016 - 12, 70_016 - 5]
)
def test_a_file_that_ends_inside_a_record(file, missing):
  data = file.read_bytes()
  file.write_bytes(data[:-missing])
  message = refusal(file)
  size = len(data) - missing
  assert f"{file} is cut short: it has {size} bytes" in message
  if missing <= 70_016 - 12:
    assert f"record 4 of 5 ends at byte {len(data)}" in message


@pytest.mark.parametrize("kept", [0, 4])
def test_a_file_that_ends_after_a_record(file, kept):
  data = b"".join(map(tiny_tfds.framed, RECORDS[:kept]))
  file.write_bytes(data)
  message = refusal(file)
  assert f"has {len(data)} bytes, of which {kept} records take" in message
  assert "it must hold 5 records" in message


def test_a_file_that_goes_on_after_its_last_record(file):
  assert "of which 4 records take 370" in refusal(file, 4)
  file.write_bytes(file.read_bytes() + b"\0")
  assert "of which 5 records take 70386" in refusal(file)


@pytest.mark.parametrize("byte", [0, 7, 8, 11])
def test_a_damaged_length(file, byte):
  data = bytearray(file.read_bytes())
  start = sum(len(record) + 16 for record in RECORDS[:2])
  data[start + byte] ^= 64
  file.write_bytes(data)
  assert f"{file} is damaged at byte {start}, where its record 2" in refusal(
    file
  )


def test_a_file_whose_end_was_never_written(file):
  data = file.read_bytes()
  file.write_bytes(data[:-70_016] + bytes(70_016))
  assert "damaged at byte 370, where its record 4 begins" in refusal(file)


def test_a_remote_file_is_refused():
  message = refusal("gs://bucket/x")
  assert "gs://bucket/x: TFRecord files are read from local" in message


@pytest.fixture
def cache(tmp_path, monkeypatch) -> pathlib.Path:
  monkeypatch.setattr(tfrecords, "MIN_CACHED_RECORDS", 1)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return tmp_path / "cache"


def read(file: pathlib.Path) -> list[bytes]:
  records = tfrecords.TFRecords([str(file)] * 2, [len(RECORDS)] * 2)
  return [records[i] for i in range(len(records))]


def test_offsets_are_kept(file, cache, monkeypatch):
  assert read(file) == RECORDS * 2
  assert len(list(cache.rglob("*.npy"))) == 1
  monkeypatch.setattr(tfrecords, "read_offsets", None)
  assert read(file) == RECORDS * 2


def test_offsets_of_a_file_that_has_changed_are_read_anew(file, cache):
  read(file)
  file.write_bytes(file.read_bytes()[:-1])
  with pytest.raises(errors.InputError, match="cut short"):
    read(file)


def test_offsets_of_a_file_of_the_same_size_or_date_are_read_anew(file, cache):
  read(file)
  stat = file.stat()
  data = bytearray(file.read_bytes())
  data[0] ^= 1
  file.write_bytes(data)
  with pytest.raises(errors.InputError, match="damaged"):
    read(file)
  file.write_bytes(data[:-1])
  os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  with pytest.raises(errors.InputError, match="damaged"):
    read(file)


@pytest.mark.parametrize(
  "content", [b"", b"\x93NUMPY", b"spoiled" * 9, "cut", "changed"]
)
def test_a_spoiled_cache_is_written_anew(file, cache, content):
  read(file)
  (kept,) = cache.rglob("*.npy")
  whole = kept.read_bytes()
  if content == "cut":
    content = whole[:-8]
  elif content == "changed":
    content = whole[:-31] + bytes([whole[-31] ^ 1]) + whole[-30:]
  kept.write_bytes(content)
  assert read(file) == RECORDS * 2
  assert kept.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_done_without(file, cache):
  cache.write_bytes(b"a file where the folder should be")
  assert read(file) == RECORDS * 2


def test_few_records_are_not_kept(file, cache, monkeypatch):
  monkeypatch.setattr(tfrecords, "MIN_CACHED_RECORDS", 11)
  assert read(file) == RECORDS * 2
  assert not cache.exists()

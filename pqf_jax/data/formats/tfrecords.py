"""Records of TFRecord files by number, without TensorFlow.

A file is a row of records, each framed as

    length uint64 | crc of the length | data | crc of the data

in little-endian numbers, with masked CRC-32C sums of four bytes
(https://www.tensorflow.org/tutorials/load_data/tfrecord). The offsets are read
once, along with the sums of the lengths, which distinguish a file that is cut
short from a damaged one; the sum of the data is checked whenever a record is
read. For many records this takes a while (two reads each), so that the
offsets are kept in the user's cache folder.
"""

import concurrent.futures
import contextlib
import hashlib
import io
import os
import pathlib
import struct
from collections.abc import Sequence

import google_crc32c
import numpy as np

from pqf_jax import errors
from pqf_jax.data import decoding
from pqf_jax.runtime import files

HEADER_BYTES, FOOTER_BYTES = 12, 4
# Offsets of fewer records are read again faster than a user would notice.
MIN_CACHED_RECORDS = 20_000
NUM_THREADS = 32
_MASK_DELTA = 0xA282EAD8


class TFRecords(decoding.Stored[bytes]):
  """The records of the files of one split."""

  def __init__(self, paths: Sequence[str], lengths: Sequence[int]) -> None:
    """Reads the offsets of all records, from the cache if they are there.

    Args:
      paths: local files.
      lengths: number of records of each, by dataset_info.json.

    Raises:
      InputError: a file is not local, cut short, damaged, or has another number
        of records.
    """
    for path in paths:
      if "://" in path:
        raise errors.InputError(
          f"{path}: TFRecord files are read from local folders only; mount the "
          "bucket (gcsfuse), or copy the files"
        )
    self._paths = list(paths)
    self._offsets = _cached_offsets(self._paths, list(lengths))
    self._starts = np.cumsum([0, *lengths])

  def __len__(self) -> int:
    return int(self._starts[-1])

  def __getitem__(self, index: int) -> bytes:
    shard = int(np.searchsorted(self._starts, index, side="right")) - 1
    record = index - int(self._starts[shard])
    start, end = self._offsets[shard][record : record + 2].tolist()
    with open(self._paths[shard], "rb", buffering=0) as file:
      file.seek(start + HEADER_BYTES)
      content = file.read(end - start - HEADER_BYTES)
    data, footer = content[:-FOOTER_BYTES], content[-FOOTER_BYTES:]
    if masked_crc32c(data) != footer:
      raise decoding.DamagedError(
        "the checksum of the record does not match its data, which must have "
        "changed since they were written"
      )
    return data


def read_offsets(path: str, num_records: int) -> np.ndarray:
  """Reads where the N records of a file begin, and where the last one ends.

  Args:
    path: of the file.
    num_records: N, by dataset_info.json.

  Returns:
    int64 [N + 1].

  Raises:
    InputError: the file is cut short, damaged, or has another number of
      records.
  """
  size = os.path.getsize(path)
  offsets = [0]
  headers: list[bytes] = []
  with open(path, "rb", buffering=0) as file:
    while len(headers) < num_records and offsets[-1] < size:
      file.seek(offsets[-1])
      header = file.read(HEADER_BYTES)
      if len(header) < HEADER_BYTES:
        offsets.append(offsets[-1] + HEADER_BYTES + FOOTER_BYTES)
        break
      headers.append(header)
      (length,) = struct.unpack_from("<Q", header)
      offsets.append(offsets[-1] + HEADER_BYTES + length + FOOTER_BYTES)
  for record, header in enumerate(headers):
    if masked_crc32c(header[:-FOOTER_BYTES]) != header[-FOOTER_BYTES:]:
      raise errors.InputError(
        f"{path} is damaged at byte {offsets[record]}, where its record "
        f"{record} begins; copy this file again"
      )
  if offsets[-1] > size:
    raise errors.InputError(
      f"{path} is cut short: it has {size} bytes, but its record "
      f"{len(offsets) - 2} of {num_records} ends at byte {offsets[-1]}; copy "
      "this file again"
    )
  if len(headers) != num_records or offsets[-1] != size:
    raise errors.InputError(
      f"{path} has {size} bytes, of which {len(headers)} records take "
      f"{offsets[-1]}, but by dataset_info.json it must hold {num_records} "
      "records and nothing else; copy this file again"
    )
  return np.array(offsets, np.int64)


def masked_crc32c(data: bytes) -> bytes:
  """Computes the sum of a TFRecord file: CRC-32C, rotated, plus a constant."""
  crc = google_crc32c.value(data)
  rotated = crc >> 15 | crc << 17
  return struct.pack("<I", (rotated + _MASK_DELTA) & 0xFFFFFFFF)


def _cached_offsets(paths: list[str], lengths: list[int]) -> list[np.ndarray]:
  """Reads the offsets of every file, from the cache if there are many."""
  if sum(lengths) < MIN_CACHED_RECORDS:
    return _read_all_offsets(paths, lengths)
  stats = [os.stat(path) for path in paths]
  key = repr(
    [
      (os.path.realpath(path), stat.st_size, stat.st_mtime_ns, length)
      for path, stat, length in zip(paths, stats, lengths, strict=True)
    ]
  )
  folder = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  digest = hashlib.sha256(key.encode()).hexdigest()[:32]
  cache = pathlib.Path(folder).expanduser() / "pqf_jax" / f"{digest}.npy"
  cuts = np.cumsum([length + 1 for length in lengths])
  # A cache that cannot be read is written again; one that cannot be written is
  # no harm.
  with contextlib.suppress(OSError, ValueError, EOFError):
    joined = np.load(cache, allow_pickle=False).ravel()
    if joined[-1:] == google_crc32c.value(joined[:-1].tobytes()):
      return np.split(joined[:-1], cuts[:-1])
  offsets = _read_all_offsets(paths, lengths)
  content = io.BytesIO()
  joined = np.concatenate(offsets)
  np.save(content, np.append(joined, google_crc32c.value(joined.tobytes())))
  with contextlib.suppress(OSError, errors.InputError):
    files.write(cache, content.getvalue())
  return offsets


def _read_all_offsets(paths: list[str], lengths: list[int]) -> list[np.ndarray]:
  # Threads hide the latency of a disk or a network.
  with concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as pool:
    return list(pool.map(read_offsets, paths, lengths))

"""CIFAR-10's archives with a few random images, byte by byte.

Pickles are written as Python 2 and NumPy wrote those of the authors.
"""

import io
import pathlib
import pickle
import struct
import tarfile
from collections.abc import Mapping

import numpy as np

NAMES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
PER_BATCH = 4
Batches = dict[str, tuple[np.ndarray, list[int]]]


def draw() -> Batches:
  """Draws {name: (uint8 [4, 32, 32, 3], labels)}."""
  rng = np.random.default_rng(0)
  return {
    name: (
      rng.integers(0, 256, (PER_BATCH, 32, 32, 3), np.uint8),
      rng.integers(0, 10, PER_BATCH).tolist(),
    )
    for name in NAMES
  }


def rows(images: np.ndarray) -> np.ndarray:
  """Returns [N, 3072]: all red values, then green, then blue."""
  return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def pickled(images: np.ndarray, labels: list[int]) -> bytes:
  def text(value: bytes) -> bytes:
    if len(value) < 256:
      return pickle.SHORT_BINSTRING + bytes([len(value)]) + value
    return pickle.BINSTRING + struct.pack("<i", len(value)) + value

  def number(value: int) -> bytes:
    return pickle.BININT + struct.pack("<i", value)

  def called(name: str) -> bytes:
    return pickle.GLOBAL + name.replace(" ", "\n").encode() + b"\n"

  data = rows(images)
  kind = (
    called("numpy dtype")
    + text(b"u1")
    + number(0)
    + number(1)
    + pickle.TUPLE3
    + pickle.REDUCE
    + pickle.MARK
    + number(3)
    + text(b"|")
    + pickle.NONE * 3
    + number(-1) * 2
    + number(0)
    + pickle.TUPLE
    + pickle.BUILD
  )
  array = (
    called("numpy.core.multiarray _reconstruct")
    + called("numpy ndarray")
    + number(0)
    + pickle.TUPLE1
    + text(b"b")
    + pickle.TUPLE3
    + pickle.REDUCE
    + pickle.MARK
    + number(1)
    + number(data.shape[0])
    + number(data.shape[1])
    + pickle.TUPLE2
    + kind
    + pickle.NEWFALSE
    + text(data.tobytes())
    + pickle.TUPLE
    + pickle.BUILD
  )
  numbers = b"".join(map(number, labels))
  return (
    pickle.PROTO
    + b"\x02"
    + pickle.EMPTY_DICT
    + pickle.MARK
    + text(b"batch_label")
    + text(b"a batch")
    + text(b"labels")
    + pickle.EMPTY_LIST
    + pickle.MARK
    + numbers
    + pickle.APPENDS
    + text(b"data")
    + array
    + pickle.SETITEMS
    + pickle.STOP
  )


def python_files(batches: Batches) -> dict[str, bytes]:
  """Makes the files of cifar-10-batches-py."""
  return {name: pickled(*batch) for name, batch in batches.items()}


def binary_files(batches: Batches) -> dict[str, bytes]:
  """Makes the files of cifar-10-batches-bin."""
  return {
    f"{name}.bin": np.concatenate(
      [np.array(labels, np.uint8)[:, None], rows(images)], axis=1
    ).tobytes()
    for name, (images, labels) in batches.items()
  }


def write_archive(
  path: pathlib.Path, folder: str, files: Mapping[str, bytes]
) -> None:
  with tarfile.open(path, "w:gz") as archive:
    # The authors' order is not that of the names.
    for name, content in sorted({"readme.html": b"", **files}.items())[::-1]:
      info = tarfile.TarInfo(f"{folder}/{name}")
      info.size = len(content)
      archive.addfile(info, io.BytesIO(content))


def write_folder(path: pathlib.Path, files: Mapping[str, bytes]) -> None:
  path.mkdir()
  for name, content in files.items():
    (path / name).write_bytes(content)

"""Images that tensorflow-datasets has prepared, read without TensorFlow.

From array_record files or, if there are only those, from TFRecord files, the
library's default. That all files are there and complete is checked at opening.
"""

import json
import os
from collections.abc import Iterator
from typing import Protocol

import tensorflow_datasets as tfds
from etils import epath
from google.protobuf import message
from tensorflow_datasets.proto import tf_example_pb2

from pqf_jax import errors
from pqf_jax.data import decoding
from pqf_jax.data.formats import array_records, tfrecords

INFO_FILE = "dataset_info.json"
# The first is preferred where there are both.
READERS = {
  "array_record": array_records.ArrayRecords,
  "tfrecord": tfrecords.TFRecords,
}


class Records(Protocol):
  """Serialized examples by number; threads may share it."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> bytes: ...

  def read_all(self) -> Iterator[bytes]:
    """All in order, where that is faster than one by one."""
    ...

  def place(self, index: int) -> str:
    """Where a record is, for messages."""
    ...


class Examples:
  """The images of a split, see `decoding.EncodedImages`.

  Parsed here, eight times as fast as by the library, and decoded elsewhere: its
  decoder would be OpenCV where that is installed, and then decode a JPEG to
  slightly other pixels.
  """

  def __init__(self, records: Records) -> None:
    self._records = records

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> decoding.EncodedImage:
    return _parse(self._records[index])

  def read_all(self) -> Iterator[decoding.EncodedImage]:
    """All in order."""
    return map(_parse, self._records.read_all())

  def place(self, index: int) -> str:
    """File and number of a record."""
    return self._records.place(index)


class Folder:
  """A prepared folder."""

  def __init__(self, path: epath.Path, how: str) -> None:
    """Opens it.

    Args:
      path: of the version, which holds `dataset_info.json`.
      how: what to do if it cannot be read.

    Raises:
      InputError: its files are in formats that cannot be read in any order.
    """
    self._path = path
    self._how = how
    info = json.loads((path / INFO_FILE).read_text())
    # Files of before 2021 do not name their format: there was but one.
    formats = [info.get("fileFormat", "tfrecord")]
    formats += info.get("alternativeFileFormats", [])
    readable = [name for name in READERS if name in formats]
    if not readable:
      raise errors.InputError(
        f"{path} is in the format {formats[0]}, of which images cannot be read "
        f"in any order; {' and '.join(READERS)} are. Keep it, and in another "
        f"folder {how}"
      )
    self._format = readable[0]
    self._info = tfds.builder_from_directory(path).info

  @property
  def num_classes(self) -> int:
    """As `features.json` says."""
    return self._info.features["label"].num_classes

  def split(self, name: str) -> decoding.EncodedImages:
    """The images of a split.

    Raises:
      InputError: the folder lacks the split or one of its files, or a file is
        not complete.
    """
    if name not in self._info.splits:
      raise errors.InputError(
        f"{self._path} has no split {name!r}, only "
        f"{', '.join(self._info.splits)}: {self._how}"
      )
    split = self._info.splits[name]
    # As if it were the only format that there is.
    template = split.filename_template.replace(filetype_suffix=self._format)
    split = split.replace(filename_template=template)
    paths = [os.fspath(path) for path in split.filepaths]
    for path in paths:
      if not epath.Path(path).exists():
        raise errors.InputError(
          f"{path} is missing, the copy is not complete: copy it, or "
          f"{self._how}"
        )
    return Examples(READERS[self._format](paths, split.shard_lengths))


def _parse(record: bytes) -> decoding.EncodedImage:
  try:
    features = tf_example_pb2.Example.FromString(record).features.feature
    (data,) = features["image"].bytes_list.value
    (label,) = features["label"].int64_list.value
  except (message.DecodeError, ValueError) as error:
    text = f"not an example with an image and a label: {error}"
    raise decoding.DamagedError(text) from error
  return decoding.EncodedImage(data, label)

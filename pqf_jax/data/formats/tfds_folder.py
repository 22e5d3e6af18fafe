"""Images that tensorflow-datasets has prepared, read without TensorFlow.

They are read from array_record files or, if there are none, from TFRecord
files, the library's default. Missing and incomplete files are refused at
opening.
"""

import bisect
import itertools
import os
from collections.abc import Callable, Iterator, Sequence

from etils import epath
from google.protobuf import message
from tensorflow_datasets.proto import tf_example_pb2

from pqf_jax import errors
from pqf_jax.data import decoding
from pqf_jax.data.formats import array_records, tfds_info, tfrecords
from pqf_jax.runtime import files

Reader = Callable[[Sequence[str], Sequence[int]], decoding.Stored[bytes]]
"""(paths, number of records of each) -> serialized examples by number."""
# The first is preferred where there are both.
READERS: dict[str, Reader] = {
  "array_record": array_records.ArrayRecords,
  "tfrecord": tfrecords.TFRecords,
}


class Examples(decoding.EncodedImages):
  """The images of a split.

  They are parsed here, eight times as fast as by the library, and decoded by
  `decoding`: the library's decoder would be OpenCV where that is installed, and
  then decode a JPEG to slightly other pixels.
  """

  def __init__(
    self, read: Reader, paths: Sequence[str], lengths: Sequence[int]
  ) -> None:
    self._records = read(paths, lengths)
    self._paths = paths
    self._ends = list(itertools.accumulate(lengths))

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> decoding.EncodedImage:
    return _parse(self._records[index])

  def read_all(self) -> Iterator[decoding.EncodedImage]:
    """Reads all in order."""
    return map(_parse, self._records.read_all())

  def place(self, index: int) -> str:
    """Returns file and number of a record."""
    shard = bisect.bisect_right(self._ends, index)
    first = self._ends[shard - 1] if shard else 0
    return f"record {index - first} of {self._paths[shard]}"


class Folder(decoding.EncodedDataset):
  """One version of a prepared data set."""

  def __init__(self, path: epath.Path, advice: str) -> None:
    """Reads the description of the data set.

    Args:
      path: of the version, which holds `dataset_info.json`.
      advice: how to prepare another copy, for messages.

    Raises:
      InputError: its files are in formats that cannot be read in any order, or
        its description is damaged.
    """
    self._path = path
    self._advice = advice
    self._info = tfds_info.read(path, advice)
    readable = [name for name in READERS if name in self._info.formats]
    if not readable:
      raise errors.InputError(
        f"{path} is in the format {self._info.formats[0]}, whose images cannot "
        f"be read in any order, as those of {' and '.join(READERS)} can; keep "
        f"it, and in another folder {advice}"
      )
    self._format = readable[0]

  @property
  def num_classes(self) -> int:
    """The number of classes in `features.json`."""
    return self._info.num_classes

  @property
  def split_names(self) -> tuple[str, ...]:
    """The names of the splits."""
    return tuple(self._info.splits)

  def split(self, name: str) -> decoding.EncodedImages:
    """Returns the images of a split.

    Raises:
      InputError: the folder lacks the split or one of its files, or a file is
        not complete.
    """
    if name not in self._info.splits:
      raise errors.InputError(
        f"{self._path} has no split {name!r}, only "
        f"{', '.join(self._info.splits)}: {self._advice}"
      )
    # Names in the chosen format, also where it is an alternative one.
    names = self._info.file_names(name, self._format)
    paths = [os.fspath(self._path / file) for file in names]
    for path in paths:
      if not epath.Path(path).exists():
        raise errors.InputError(
          f"{path} is missing: copy this file again, or {self._advice}"
        )
      files.check_regular(path)
    lengths = self._info.splits[name].shard_lengths
    return Examples(READERS[self._format], paths, lengths)


def prepare_command(name: str) -> str:
  """Returns how a data set is prepared, with {data_dir} for the folder."""
  return (
    "where tensorflow is installed too, run "
    'python -c "import tensorflow_datasets as tfds; '
    f"tfds.builder('{name}', data_dir='{{data_dir}}', "
    "file_format='array_record').download_and_prepare()\""
  )


def _parse(record: bytes) -> decoding.EncodedImage:
  try:
    features = tf_example_pb2.Example.FromString(record).features.feature
    (data,) = features["image"].bytes_list.value
    (label,) = features["label"].int64_list.value
  except (message.DecodeError, ValueError) as error:
    text = f"the record is not an example with image and label: {error}"
    raise decoding.DamagedError(text) from error
  return decoding.EncodedImage(data, label)

"""Data sets in the files of tensorflow-datasets, written without TensorFlow.

A folder `<name>/<version>` holds array_record files, `dataset_info.json`,
`features.json` and the names of the classes. It is written under another name
and renamed when it is complete.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from pqf_jax import errors
from pqf_jax.data import decoding
from pqf_jax.runtime import files

# The size of the shards of tensorflow-datasets.
SHARD_BYTES = 128 * 2**20
# For an image, besides its bytes: file name, label and index.
OVERHEAD_BYTES = 256
# Images are compressed already, and one in a group is read alone.
_OPTIONS = "group_size:1,uncompressed"


class Split(NamedTuple):
  """Images to write, with their file names and sizes in bytes."""

  images: decoding.EncodedImages
  file_names: Sequence[str]
  num_bytes: Sequence[int]


def new_folder(folder: pathlib.Path, name: str, version: str) -> pathlib.Path:
  """Returns the folder that a data set will be written to.

  Raises:
    InputError: the folder exists already.
  """
  target = folder / name / version
  if target.exists():
    raise errors.InputError(
      f"{target} exists already; remove it, or give another folder"
    )
  return target


def write_dataset(
  folder: pathlib.Path,
  splits: Mapping[str, Split],
  *,
  name: str,
  version: str,
  class_names: Sequence[str],
  advance: Callable[[int], None] = lambda num_images: None,
) -> pathlib.Path:
  """Writes `folder/name/version`, or continues a run that was stopped.

  Images keep their order, so that readers have to shuffle.

  Args:
    folder: the data_dir.
    splits: by name.
    name: of the data set.
    version: such as 5.1.0.
    class_names: in the order of the labels.
    advance: called with the number of images that were written since.

  Returns:
    The folder that was written.

  Raises:
    InputError: the folder exists already, an image is empty, or the disk
      cannot hold all of them.
  """
  target = new_folder(folder, name, version)
  for data in splits.values():
    if 0 in data.num_bytes:
      place = data.images.place(list(data.num_bytes).index(0))
      raise errors.InputError(f"{place} is empty; copy it again")
  # The name depends on the content, so that only a run that writes the same
  # images continues with its files.
  partial = target.with_name(f"incomplete.{_digest(splits)}_{version}")
  partial.mkdir(parents=True, exist_ok=True)
  shards = {split: _cut(data.num_bytes) for split, data in splits.items()}
  paths = {
    split: [
      partial / f"{name}-{split}.array_record-{i:05d}-of-{len(cuts):05d}"
      for i in range(len(cuts))
    ]
    for split, cuts in shards.items()
  }
  files.check_space(
    partial,
    sum(
      sum(splits[split].num_bytes[i] + OVERHEAD_BYTES for i in range(*cut))
      for split in splits
      for path, cut in zip(paths[split], shards[split], strict=True)
      if not path.exists()
    ),
  )
  for split, data in splits.items():
    for path, (start, stop) in zip(paths[split], shards[split], strict=True):
      if not path.exists():
        _write_shard(path, data, range(start, stop))
      advance(stop - start)
  _write_info(partial, splits, shards, name, version)
  _features(class_names).save_config(partial)
  (partial / "label.labels.txt").write_text("\n".join(class_names) + "\n")
  os.replace(partial, target)
  return target


def _digest(splits: Mapping[str, Split]) -> str:
  """Hashes the names and sizes of the images."""
  digest = hashlib.sha256()
  for split, data in splits.items():
    digest.update(repr((split, len(data.file_names))).encode())
    for file_name, num_bytes in zip(
      data.file_names, data.num_bytes, strict=True
    ):
      digest.update(f"{file_name} {num_bytes}\n".encode())
  return digest.hexdigest()[:12]


def _cut(num_bytes: Sequence[int]) -> list[tuple[int, int]]:
  """Returns the first image of every shard, and the one after its last."""
  cuts, start, shard_bytes = [], 0, 0
  for index, size in enumerate(num_bytes):
    if shard_bytes and shard_bytes + size > SHARD_BYTES:
      cuts.append((start, index))
      start, shard_bytes = index, 0
    shard_bytes += size
  return [*cuts, (start, len(num_bytes))]


def _write_shard(path: pathlib.Path, split: Split, images: range) -> None:
  partial = path.with_name(f"{path.name}.partial")
  writer = array_record_module.ArrayRecordWriter(str(partial), _OPTIONS)
  for index in images:
    writer.write(_example(split.images[index], split.file_names[index]))
  writer.close()
  os.replace(partial, path)


def _example(image: decoding.EncodedImage, file_name: str) -> bytes:
  def feature(values: Sequence[bytes]) -> tf_feature_pb2.Feature:
    return tf_feature_pb2.Feature(
      bytes_list=tf_feature_pb2.BytesList(value=values)
    )

  label = tf_feature_pb2.Feature(
    int64_list=tf_feature_pb2.Int64List(value=[image.label])
  )
  features = {
    "file_name": feature([file_name.encode()]),
    "image": feature([image.data]),
    "label": label,
  }
  example = tf_example_pb2.Example(
    features=tf_feature_pb2.Features(feature=features)
  )
  return example.SerializeToString(deterministic=True)


def _features(class_names: Sequence[str]) -> tfds.features.FeaturesDict:
  return tfds.features.FeaturesDict(
    {
      "file_name": tfds.features.Text(),
      "image": tfds.features.Image(encoding_format="jpeg"),
      "label": tfds.features.ClassLabel(num_classes=len(class_names)),
    }
  )


def _write_info(
  folder: pathlib.Path,
  splits: Mapping[str, Split],
  shards: Mapping[str, list[tuple[int, int]]],
  name: str,
  version: str,
) -> None:
  info = {
    "description": "ILSVRC 2012, images in the order of their source.",
    "disableShuffling": True,
    "fileFormat": "array_record",
    "name": name,
    "splits": [
      {
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        "name": split,
        "numBytes": str(sum(splits[split].num_bytes)),
        "shardLengths": [str(stop - start) for start, stop in cuts],
      }
      for split, cuts in shards.items()
    ],
    "supervisedKeys": {
      "tuple": {"items": [{"featureKey": "image"}, {"featureKey": "label"}]}
    },
    "version": version,
  }
  (folder / "dataset_info.json").write_text(json.dumps(info, indent=2))

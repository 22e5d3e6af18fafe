"""ImageNet in the files of tensorflow-datasets, written without TensorFlow.

A folder `imagenet2012/5.1.0` holds array_record files, `dataset_info.json`,
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
from tensorflow_datasets.proto import tf_example_pb2

from pqf_jax import errors
from pqf_jax.data import decoding
from pqf_jax.runtime import files

NAME, VERSION = "imagenet2012", "5.1.0"
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


def new_folder(data_dir: pathlib.Path) -> pathlib.Path:
  """Returns the folder that the data set will be written to.

  Raises:
    InputError: the folder exists already.
  """
  target = data_dir / NAME / VERSION
  if target.exists():
    raise errors.InputError(
      f"{target} exists already; remove it, or give another folder"
    )
  return target


def write_dataset(
  data_dir: pathlib.Path,
  splits: Mapping[str, Split],
  *,
  class_names: Sequence[str],
  advance: Callable[[int], None] = lambda num_images: None,
) -> pathlib.Path:
  """Writes the folder of `new_folder`, or continues a run that was stopped.

  Images keep their order, so that readers have to shuffle.

  Args:
    data_dir: where the folder is made.
    splits: {name: images}, such as `train`.
    class_names: in the order of the labels.
    advance: called with the number of images that were written since.

  Returns:
    The folder that was written.

  Raises:
    InputError: the folder exists already, an image is empty, or the disk
      cannot hold all of them.
  """
  target = new_folder(data_dir)
  for data in splits.values():
    if 0 in data.num_bytes:
      place = data.images.place(list(data.num_bytes).index(0))
      raise errors.InputError(f"{place} is empty; copy it again")
  # The name depends on the content, so that only a run that writes the same
  # images continues with its files.
  partial = target.with_name(f"incomplete.{_digest(splits)}_{VERSION}")
  partial.mkdir(parents=True, exist_ok=True)
  shards = {
    split: _cut(partial / f"{NAME}-{split}", data.num_bytes)
    for split, data in splits.items()
  }
  num_bytes = 0
  for split, data in splits.items():
    for path, images in shards[split].items():
      if not path.exists():
        num_bytes += sum(data.num_bytes[i] + OVERHEAD_BYTES for i in images)
  files.check_space(partial, num_bytes)
  for split, data in splits.items():
    for path, images in shards[split].items():
      if not path.exists():
        _write_shard(path, data, images)
      advance(len(images))
  _write_info(partial, splits, shards)
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


def _cut(
  prefix: pathlib.Path, num_bytes: Sequence[int]
) -> dict[pathlib.Path, range]:
  """Returns {path: images} of the shards of a split."""
  shards, start, shard_bytes = [], 0, 0
  for index, size in enumerate(num_bytes):
    if shard_bytes and shard_bytes + size > SHARD_BYTES:
      shards.append(range(start, index))
      start, shard_bytes = index, 0
    shard_bytes += size
  shards.append(range(start, len(num_bytes)))
  return {
    prefix.with_name(
      f"{prefix.name}.array_record-{number:05d}-of-{len(shards):05d}"
    ): images
    for number, images in enumerate(shards)
  }


def _write_shard(path: pathlib.Path, split: Split, images: range) -> None:
  partial = path.with_name(f"{path.name}.partial")
  writer = array_record_module.ArrayRecordWriter(str(partial), _OPTIONS)
  for index in images:
    writer.write(_example(split.images[index], split.file_names[index]))
  writer.close()
  os.replace(partial, path)


def _example(image: decoding.EncodedImage, file_name: str) -> bytes:
  example = tf_example_pb2.Example()
  feature = example.features.feature
  feature["file_name"].bytes_list.value.append(file_name.encode())
  feature["image"].bytes_list.value.append(image.data)
  feature["label"].int64_list.value.append(image.label)
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
  shards: Mapping[str, Mapping[pathlib.Path, range]],
) -> None:
  info = {
    "description": "ILSVRC 2012, images in the order of their source.",
    "disableShuffling": True,
    "fileFormat": "array_record",
    "name": NAME,
    "splits": [
      {
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        "name": split,
        "numBytes": str(sum(splits[split].num_bytes)),
        "shardLengths": [str(len(images)) for images in shards[split].values()],
      }
      for split in splits
    ],
    "supervisedKeys": {
      "tuple": {"items": [{"featureKey": "image"}, {"featureKey": "label"}]}
    },
    "version": VERSION,
  }
  (folder / "dataset_info.json").write_text(json.dumps(info, indent=2))

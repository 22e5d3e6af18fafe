"""Reads the two descriptions of a data set that tensorflow-datasets prepared.

`dataset_info.json` has its name, formats and splits, `features.json` its
classes. tensorflow-datasets itself would import the Python modules that they
name, and so could run code that came with the data.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from etils import epath
from google.protobuf import json_format, message
from tensorflow_datasets.core.proto import dataset_info_pb2, feature_pb2

from pqf_jax import errors
from pqf_jax.runtime import files

INFO_FILE = "dataset_info.json"
FEATURES_FILE = "features.json"
# Where a description names none.
DEFAULT_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
DEFAULT_FORMAT = "tfrecord"  # before 2021 there was only one

Message = TypeVar("Message", bound=message.Message)


class Info(NamedTuple):
  """What the descriptions say.

  Attributes:
    name: of the data set.
    formats: names of those that its files are in, one or more.
    splits: by name; `shard_lengths` are the images in each file.
    num_classes: labels are less.
  """

  name: str
  formats: tuple[str, ...]
  splits: Mapping[str, dataset_info_pb2.SplitInfo]
  num_classes: int

  def file_names(self, split: str, file_format: str) -> list[str]:
    """Returns the names of a split's files in one of the formats, in order."""
    template = self.splits[split].filepath_template or DEFAULT_TEMPLATE
    count = len(self.splits[split].shard_lengths)
    names = []
    for index in range(count):
      fields = {
        "{DATASET}": self.name,
        "{SPLIT}": split,
        "{FILEFORMAT}": file_format,
        "{SHARD_INDEX}": f"{index:05d}",
        "{NUM_SHARDS}": f"{count:05d}",
        "{SHARD_X_OF_Y}": f"{index:05d}-of-{count:05d}",
      }
      parts = re.split(r"({\w+})", template)
      names.append("".join(fields.get(part, part) for part in parts))
    return names


def read(folder: epath.Path, advice: str) -> Info:
  """Reads the descriptions in the folder of a version.

  Args:
    folder: with both files.
    advice: what to do where one is damaged.

  Raises:
    InputError: a file is missing or damaged; names it and what is wrong.
  """
  path = folder / INFO_FILE
  content = files.read_json(path, advice)
  stored = _parse(path, content, dataset_info_pb2.DatasetInfo(), advice)
  info = Info(
    stored.name,
    (stored.file_format or DEFAULT_FORMAT, *stored.alternative_file_formats),
    {split.name: split for split in stored.splits},
    _num_classes(folder / FEATURES_FILE, advice),
  )
  for name, split in info.splits.items():
    first = pathlib.PurePosixPath(*info.file_names(name, info.formats[0])[:1])
    if first.is_absolute() or ".." in first.parts:
      raise _damaged(path, f"a file of {name!r} is {str(first)!r}", advice)
    if not split.shard_lengths or min(split.shard_lengths) < 0:
      lengths = list(split.shard_lengths)
      raise _damaged(path, f"shardLengths of {name!r} are {lengths}", advice)
  return info


def _num_classes(path: epath.Path, advice: str) -> int:
  """Reads the classes of the feature 'label'."""
  if not path.exists():
    raise errors.InputError(f"{path} is missing: {advice}")
  content = files.read_json(path, advice)
  if "type" in content:  # the notation before 2022
    content = _modern(content)
  features = _parse(path, content, feature_pb2.Feature(), advice)
  count = features.features_dict.features["label"].class_label.num_classes
  if count < 1:
    raise _damaged(path, "it has no feature 'label' with classes", advice)
  return count


def _modern(content: dict[str, Any]) -> dict[str, Any]:
  """Returns the classes in today's notation; {} where there are none."""
  match content:
    case {"proto_cls": _, "content": dict(features)}:
      return {"featuresDict": features}
    case {"content": {"label": {"content": {"num_classes": count}}}}:
      label = {"classLabel": {"numClasses": count}}
      return {"featuresDict": {"features": {"label": label}}}
  return {}


def _parse(
  path: epath.Path, content: dict[str, Any], empty: Message, advice: str
) -> Message:
  """Fills a message, which checks the types of all its fields."""
  try:
    return json_format.ParseDict(content, empty, ignore_unknown_fields=True)
  except json_format.ParseError as error:
    reason = " ".join(str(error).split())  # it quotes the file
    raise _damaged(path, reason[:200], advice) from error


def _damaged(path: epath.Path, why: str, advice: str) -> errors.InputError:
  return errors.InputError(f"{path} is damaged: {why}; {advice}")

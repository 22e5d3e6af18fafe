"""Images that tensorflow-datasets has prepared, read without TensorFlow.

Only array_record files can be read in any order. What can be wrong with a
folder is found when it is opened, because the library's own messages name the
wrong cause: a missing folder, for one, is reported as a matter of formats.
"""

import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from pqf_jax import errors
from pqf_jax.data import sources, transforms

Transform = Callable[[Image.Image], Image.Image]
INFO_FILE = "dataset_info.json"
FILE_FORMAT = "array_record"


class Records:
  """A source that decodes and transforms each image when it is read."""

  def __init__(
    self, raw: Any, num_classes: int, place: str, transform: Transform
  ) -> None:
    self._raw = raw
    self._num_classes = num_classes
    self._place = place
    self._transform = transform

  def __len__(self) -> int:
    return len(self._raw)

  def __getitem__(self, index: int) -> sources.Record:
    return self._decode(index, self._raw[index])

  def in_memory(self) -> sources.InMemory:
    """The same source, decoded once and in a third of the time."""

    def read_all() -> list[sources.Record]:
      raw = self._raw.__getitems__(range(len(self)))
      return [self._decode(index, record) for index, record in enumerate(raw)]

    return sources.InMemory(len(self), read_all)

  def _decode(self, index: int, raw: dict[str, Any]) -> sources.Record:
    label = int(raw["label"])
    if not 0 <= label < self._num_classes:
      raise errors.InputError(
        f"image {index} of {self._place} has label {label}, but the data set "
        f"has classes 0 to {self._num_classes - 1}; prepare it again"
      )
    image = self._transform(transforms.decode_image(raw["image"]))
    return {"image": np.asarray(image), "label": label}


class Folder:
  """A prepared folder; its splits are sources."""

  def __init__(self, path: epath.Path, prepare: str) -> None:
    self._path = path
    self._prepare = prepare
    self._builder = tfds.builder_from_directory(path)

  @property
  def num_classes(self) -> int:
    """As `features.json` says."""
    return self._builder.info.features["label"].num_classes

  def split(self, name: str, transform: Transform) -> Records:
    """The images of a split.

    Raises:
      InputError: the folder lacks the split or one of its files.
    """
    splits = self._builder.info.splits
    if name not in splits:
      raise errors.InputError(
        f"{self._path} has no split {name!r}, only {', '.join(splits)}: "
        f"{self._prepare}"
      )
    # The decoder of tensorflow-datasets would be OpenCV where that is
    # installed, and then decode a JPEG to slightly other pixels.
    raw = self._builder.as_data_source(
      name, decoders={"image": tfds.decode.SkipDecoding()}
    )
    # Asked for anew: of two formats, they are now those of the one read.
    files = self._builder.info.splits[name].filepaths
    for file in map(epath.Path, files):
      if not file.exists():
        raise errors.InputError(
          f"{file} is missing, the copy is not complete: copy it, or "
          f"{self._prepare}"
        )
    return Records(raw, self.num_classes, f"{self._path}:{name}", transform)


def open_folder(name: str, data_dir: str | None, *, prepare: str) -> Folder:
  """Finds the newest version of a data set.

  Args:
    name: of the data set.
    data_dir: the folder that holds `<name>/<version>/dataset_info.json`.
    prepare: the command that makes it, with {data_dir} for that folder.

  Raises:
    InputError: it is not there; the message says what was looked for, and the
      folder to give or the command to run.
  """
  if not data_dir:
    raise errors.InputError(
      f"{name} needs data_dir (--config.data.dir), the folder that holds "
      f"{name}/VERSION/{INFO_FILE}; {_how(prepare, 'DIR')}"
    )
  top = epath.Path(_absolute(os.fspath(data_dir)))
  how = _how(prepare, str(top))
  versions = _versions(top / name)
  if not versions:
    wanted = f"{name}: there is no {top / name}/VERSION/{INFO_FILE}"
    for parent in (top.parent, top.parent.parent):
      if _versions(parent / name):
        raise errors.InputError(
          f"{wanted}, but data_dir={parent} has it: give that folder"
        )
    state = "" if top.exists() else f" (not even a folder {top})"
    raise errors.InputError(f"{wanted}{state}; {how}")
  path = max(versions, key=_version_number)
  info = json.loads((path / INFO_FILE).read_text())
  # Files of before 2021 do not name their format: there was but one.
  formats = [info.get("fileFormat", "tfrecord")]
  formats += info.get("alternativeFileFormats", [])
  if FILE_FORMAT not in formats:
    raise errors.InputError(
      f"{path} is in the format {formats[0]}, which cannot be read in any "
      f"order; keep it, and for {FILE_FORMAT} take another data_dir: "
      f"{_how(prepare, f'{top}_{FILE_FORMAT}')}"
    )
  return Folder(path, how)


def _how(prepare: str, data_dir: str) -> str:
  return (
    "prepare it once, where tensorflow is installed too: "
    + prepare.format(data_dir=data_dir)
  )


def _absolute(folder: str) -> str:
  """So that a relative folder has parents to look into; not for gs://..."""
  if "://" in folder:
    return folder
  return os.path.abspath(os.path.expanduser(folder))


def _versions(folder: epath.Path) -> list[epath.Path]:
  return [file.parent for file in folder.glob(f"*/{INFO_FILE}")]


def _version_number(path: epath.Path) -> list[int]:
  return [int(part) if part.isdigit() else -1 for part in path.name.split(".")]

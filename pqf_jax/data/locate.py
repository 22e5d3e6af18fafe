"""Finds out in which form a copy of a data set is at hand, and opens it.

Three forms are read: what tensorflow-datasets prepared, in array_record or in
TFRecord files, and folders of images. Nothing is downloaded. What is wrong with
a folder is found here, because the library's own messages name the wrong cause:
a missing folder, for one, is reported as a matter of formats.
"""

import os
import pathlib
from collections.abc import Sequence

from etils import epath

from pqf_jax import errors
from pqf_jax.data.formats import image_files, tfds_folder

Copy = tfds_folder.Folder | image_files.Folder
INFO_FILE = "dataset_info.json"


def open_copy(
  name: str,
  data_dir: str | None,
  *,
  prepare: str,
  class_names: Sequence[str] | None = None,
) -> Copy:
  """Opens the newest version of a data set.

  Args:
    name: of the data set.
    data_dir: the folder that holds `<name>/<version>/dataset_info.json`, or
      `train` and `val`.
    prepare: the command that makes it, with {data_dir} for that folder.
    class_names: names of the folders in `train`; None: folders of images are
      no form of this data set.

  Raises:
    InputError: it is not there; the message says what was looked for, and the
      folder to give or the command to run.
  """
  forms = f"{name}/VERSION/{INFO_FILE}"
  if class_names is not None:
    forms += ", or train/CLASS and val/CLASS with the images"
  if not data_dir:
    raise errors.InputError(
      f"{name} needs data_dir (--config.data.dir), the folder that holds "
      f"{forms}; {_how(prepare, 'DIR')}"
    )
  top = _absolute(data_dir)
  versions = _versions(top / name)
  if versions:
    newest = max(versions, key=_version_number)
    # Another folder: with this one, the data set would be there already.
    other = _how(prepare, f"{top}_array_record")
    return tfds_folder.Folder(newest, other)
  if class_names is not None and _has_images(top):
    return image_files.Folder(pathlib.Path(top), class_names)
  wanted = f"{name}: there is no {top / name}/VERSION/{INFO_FILE}"
  if class_names is not None:
    wanted += f" and no {top / 'train'}"
  for parent in (top.parent, top.parent.parent):
    if _versions(parent / name) or (
      class_names is not None and _has_images(parent)
    ):
      raise errors.InputError(
        f"{wanted}, but data_dir={parent} has it: give that folder"
      )
  state = "" if top.exists() else f" (not even a folder {top})"
  raise errors.InputError(f"{wanted}{state}; {_how(prepare, str(top))}")


def open_image_folder(data_dir: str) -> image_files.Folder:
  """Opens folders of images with any classes.

  Args:
    data_dir: the folder that holds `train` and `val`.

  Raises:
    InputError: it does not.
  """
  top = _absolute(data_dir)
  if _has_images(top):
    return image_files.Folder(pathlib.Path(top))
  wanted = f"image_folder: there is no {top / 'train'}"
  if _has_images(top.parent):
    raise errors.InputError(
      f"{wanted}, but data_dir={top.parent} has it: give that folder"
    )
  state = "" if top.exists() else f" (not even a folder {top})"
  raise errors.InputError(
    f"{wanted}{state}; give the folder that holds train/CLASS and val/CLASS "
    "with the images"
  )


def _how(prepare: str, data_dir: str) -> str:
  return f"prepare it once: {prepare.format(data_dir=data_dir)}"


def _absolute(folder: str) -> epath.Path:
  """So that a relative folder has parents to look into; not for gs://..."""
  folder = os.fspath(folder)
  if "://" in folder:
    return epath.Path(folder)
  return epath.Path(os.path.abspath(os.path.expanduser(folder)))


def _has_images(folder: epath.Path) -> bool:
  # Folders of images are read locally only.
  names = ("train", *image_files.TEST_FOLDERS)
  return "://" not in os.fspath(folder) and any(
    (folder / name).is_dir() for name in names
  )


def _versions(folder: epath.Path) -> list[epath.Path]:
  return [
    file.parent
    for file in folder.glob(f"*/{INFO_FILE}")
    # Those being written are named so, and may be complete but for the move.
    if not file.parent.name.startswith("incomplete")
  ]


def _version_number(path: epath.Path) -> list[int]:
  return [int(part) if part.isdigit() else -1 for part in path.name.split(".")]

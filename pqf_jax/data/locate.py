"""Finds the prepared copy of a data set in a folder, and opens it.

A copy is what tensorflow-datasets prepared, in array_record or in TFRecord
files, or has a layout of its own, such as folders of images. Nothing is
downloaded. A wrong folder is refused here, because tensorflow-datasets names
the wrong cause: it reports a missing folder as an unknown format.
"""

import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from etils import epath

from pqf_jax import errors
from pqf_jax.data import decoding
from pqf_jax.data.formats import image_files, tfds_folder, tfds_info


class Layout(NamedTuple):
  """Files of a data set that tensorflow-datasets did not prepare.

  They are read locally only.

  Attributes:
    text: what a folder must hold, for messages.
    is_in: whether it seems to.
    open: opens the folder; raises an `InputError` where it is not complete.
  """

  text: str
  is_in: Callable[[pathlib.Path], bool]
  open: Callable[[pathlib.Path], decoding.EncodedDataset]


def image_folders(class_names: Sequence[str] = ()) -> Layout:
  """Returns the layout of `image_files.Folder`."""
  return Layout(
    "train/CLASS and val/CLASS with the images",
    lambda folder: any(
      (folder / name).is_dir() for name in ("train", *image_files.TEST_FOLDERS)
    ),
    functools.partial(image_files.Folder, class_names=class_names),
  )


def open_copy(
  name: str,
  data_dir: str | None,
  *,
  prepare_command: str = "",
  layout: Layout | None = None,
) -> decoding.EncodedDataset:
  """Opens the newest version of a data set.

  Args:
    name: of the data set.
    data_dir: the folder that holds `<name>/<version>/dataset_info.json`, or
      files of the layout.
    prepare_command: the command that makes a copy, with {data_dir} in place of
      that folder; '': only the layout is expected.
    layout: another one that the folder may have.

  Raises:
    InputError: the folder holds no copy; the message says what was looked for,
      and the folder to give or the command to run.
  """
  layouts = []
  if prepare_command:
    layouts.append(f"{name}/VERSION/{tfds_info.INFO_FILE}")
  if layout is not None:
    layouts.append(layout.text)
  folder = f"the folder that holds {' or '.join(layouts)}"

  def advice(new_dir: str) -> str:
    if not prepare_command:
      return f"give {folder}"
    return f"prepare it once: {prepare_command.format(data_dir=new_dir)}"

  if not data_dir:
    raise errors.InputError(
      f"{name} needs data_dir (--config.data.dir), {folder}; {advice('DIR')}"
    )
  top = _absolute(data_dir)
  versions = _versions(top / name)
  if versions:
    newest = max(versions, key=_version_number)
    # Not into `top`: the command would find the data set there already.
    return tfds_folder.Folder(newest, advice(f"{top}_array_record"))
  if layout is not None and _has(layout, top):
    return layout.open(pathlib.Path(top))
  missing = "" if top.exists() else " (it does not exist)"
  problem = f"{name}: found no {' or '.join(layouts)} in {top}{missing}"
  for parent in (top.parent, top.parent.parent):
    if _versions(parent / name) or (
      layout is not None and _has(layout, parent)
    ):
      raise errors.InputError(
        f"{problem}, but data_dir={parent} has it: give that folder"
      )
  raise errors.InputError(f"{problem}; {advice(str(top))}")


def _absolute(folder: str) -> epath.Path:
  """Makes a path absolute, so that it has parents to look into."""
  folder = os.fspath(folder)
  if "://" in folder:
    return epath.Path(folder)
  return epath.Path(os.path.abspath(os.path.expanduser(folder)))


def _has(layout: Layout, folder: epath.Path) -> bool:
  is_local = "://" not in os.fspath(folder)
  return is_local and layout.is_in(pathlib.Path(folder))


def _versions(folder: epath.Path) -> list[epath.Path]:
  return [
    file.parent
    for file in folder.glob(f"*/{tfds_info.INFO_FILE}")
    # A folder that is being written is named so; it may be complete already.
    if not file.parent.name.startswith("incomplete")
  ]


def _version_number(path: epath.Path) -> list[int]:
  return [int(part) if part.isdigit() else -1 for part in path.name.split(".")]

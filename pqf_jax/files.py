"""Files that are written whole or not at all, on local and remote storage."""

import errno
import os
import shutil

from etils import epath

from pqf_jax import errors


def write(path: epath.PathLike, data: bytes) -> None:
  """Writes a file; a neighbour `<path>.partial` exists while it is written.

  Args:
    path: of the file; its folder is made where there is none.
    data: all of its content.

  Raises:
    InputError: the disk is full.
  """
  target = epath.Path(path)
  target.parent.mkdir(parents=True, exist_ok=True)
  partial = target.with_name(f"{target.name}.partial")
  try:
    partial.write_bytes(data)
    partial.replace(target)
  except OSError as error:
    partial.unlink(missing_ok=True)
    if error.errno == errno.ENOSPC:
      raise disk_full(path) from error
    raise


def check_space(folder: epath.PathLike, num_bytes: int) -> None:
  """Refuses what the disk cannot hold, before it is written.

  Args:
    folder: exists; remote storage is not asked.
    num_bytes: that will be written there.

  Raises:
    InputError: less than that is free.
  """
  remote = "://" in os.fspath(folder)
  if not remote and shutil.disk_usage(folder).free < num_bytes:
    raise disk_full(folder)


def disk_full(path: epath.PathLike) -> errors.InputError:
  """The error of a disk that cannot hold the file."""
  return errors.InputError(
    f"no space is left for {path}; free some and run the same command: it goes "
    "on where it stopped"
  )

"""Writes files whole or not at all, on local and remote storage."""

import errno
import functools
import os
import shutil
import tempfile

from etils import epath

from pqf_jax import errors


def absolute(path: epath.PathLike) -> epath.Path:
  """Returns an absolute path, with ~ expanded.

  Args:
    path: on a disk, or gs://BUCKET/... or another address that `etils.epath`
      knows, which is returned unchanged.

  Raises:
    InputError: the package that reads such storage is not installed.
  """
  given = epath.Path(path)
  if not is_remote(given):
    return given.expanduser().resolve()
  try:
    given.exists()
  except ImportError as error:
    raise errors.InputError(
      f"{path} needs a package that is not installed: {error} (for gs:// pip "
      "install gcsfs)"
    ) from error
  return given


def is_remote(path: epath.PathLike) -> bool:
  """Whether the path is not on this machine, so that only epath can open it."""
  return "://" in os.fspath(path)


def write(path: epath.PathLike, data: bytes) -> None:
  """Writes a file as `<path>.partial`, then renames it; creates its folder.

  In a bucket it writes directly: an object appears when it is complete.

  Raises:
    InputError: the disk is full.
  """
  target = epath.Path(path)
  if is_remote(target):
    target.write_bytes(data)
    return
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


def fetch(path: epath.PathLike) -> str:
  """Returns the path of a local file; copies a remote file to this machine.

  Args:
    path: of a file. The copy of a remote file is deleted when the program ends.

  Raises:
    InputError: the file does not exist, or is a folder.
  """
  source = absolute(path) if is_remote(path) else epath.Path(path).expanduser()
  if source.is_dir():
    raise errors.InputError(f"{path} is a folder; give a file in it")
  if not source.exists():
    raise errors.InputError(
      f"no weights file {path} (looked in {os.getcwd()}); check the path"
    )
  if not is_remote(source):
    return os.fspath(source)
  folder = tempfile.mkdtemp(dir=_download_folder().name)
  copy = epath.Path(folder) / source.name
  copy.write_bytes(source.read_bytes())
  return os.fspath(copy)


@functools.cache
def _download_folder() -> tempfile.TemporaryDirectory:
  return tempfile.TemporaryDirectory(prefix="pqf_jax_")


def check_space(folder: epath.PathLike, num_bytes: int) -> None:
  """Refuses to begin a write that the disk cannot hold.

  Args:
    folder: an existing one; remote storage is not checked.
    num_bytes: to be written there.

  Raises:
    InputError: fewer bytes are free.
  """
  if not is_remote(folder) and shutil.disk_usage(folder).free < num_bytes:
    raise disk_full(folder)


def disk_full(path: epath.PathLike) -> errors.InputError:
  """Returns the error of a disk that cannot hold the file."""
  return errors.InputError(
    f"no space is left for {path}; free some and run the same command, which "
    "continues where it stopped"
  )

"""Files that are written whole or not at all, on local and remote storage."""

import errno
import functools
import os
import shutil
import tempfile

from etils import epath

from pqf_jax import errors


def absolute(path: epath.PathLike) -> epath.Path:
  """The path as any process may use it, local or remote.

  Args:
    path: on a disk, or gs://BUCKET/... and whatever else `etils.epath` knows.

  Raises:
    InputError: the package that reads such storage is not installed.
  """
  found = epath.Path(path)
  if not is_remote(found):
    return found.expanduser().resolve()
  try:
    found.exists()
  except ImportError as error:
    raise errors.InputError(
      f"{path} needs a package that is not installed: {error} (for gs:// pip "
      "install gcsfs)"
    ) from error
  return found


def is_remote(path: epath.PathLike) -> bool:
  """Whether it is no file of this machine, so that only epath can open it."""
  return "://" in os.fspath(path)


def write(path: epath.PathLike, data: bytes) -> None:
  """Writes a file; a neighbour `<path>.partial` exists while it is written.

  In a bucket there is none: an object appears when all of it has arrived.

  Args:
    path: of the file; its folder is made where there is none.
    data: all of its content.

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
  """A file of this machine with the same content.

  Args:
    path: of a file here, which is returned as it is, or of a remote one, which
      is copied; the copy is deleted when the program ends.

  Raises:
    InputError: there is no such file.
  """
  source = absolute(path) if is_remote(path) else epath.Path(path).expanduser()
  if source.is_dir():
    raise errors.InputError(f"{path} is a folder; give the file in it")
  if not source.exists():
    raise errors.InputError(
      f"no weights file {path} (looked in {os.getcwd()}); check the path"
    )
  if not is_remote(source):
    return os.fspath(source)
  folder = tempfile.mkdtemp(dir=_copies().name)
  copy = epath.Path(folder) / source.name
  copy.write_bytes(source.read_bytes())
  return os.fspath(copy)


@functools.cache
def _copies() -> tempfile.TemporaryDirectory:
  return tempfile.TemporaryDirectory(prefix="pqf_jax_")


def check_space(folder: epath.PathLike, num_bytes: int) -> None:
  """Refuses what the disk cannot hold, before it is written.

  Args:
    folder: exists; remote storage is not asked.
    num_bytes: that will be written there.

  Raises:
    InputError: less than that is free.
  """
  if not is_remote(folder) and shutil.disk_usage(folder).free < num_bytes:
    raise disk_full(folder)


def disk_full(path: epath.PathLike) -> errors.InputError:
  """The error of a disk that cannot hold the file."""
  return errors.InputError(
    f"no space is left for {path}; free some and run the same command: it goes "
    "on where it stopped"
  )

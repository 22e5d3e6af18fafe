"""Writes files whole or not at all, on local and remote storage."""

import contextlib
import datetime
import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator
from typing import IO, Any

import numpy as np
from etils import epath

from pqf_jax import errors


def absolute(path: epath.PathLike) -> epath.Path:
  """Returns an absolute path, with ~ expanded.

  Args:
    path: on a disk, or gs://BUCKET/... or another address that `etils.epath`
      knows, which is returned unchanged.

  Raises:
    InputError: no package reads such storage, or it is not installed.
  """
  try:
    given = epath.Path(path)
    if not is_remote(given):
      return given.expanduser().resolve()
    given.exists()
  except ImportError as error:
    raise errors.InputError(
      f"{path} needs a package that is not installed: {error} (for gs:// pip "
      "install gcsfs)"
    ) from error
  except KeyError as error:
    raise errors.InputError(
      f"{path} is on storage of a kind that is not known ({error}); copy it to "
      "this machine or to a bucket (gs://...)"
    ) from error
  return given


def is_remote(path: epath.PathLike) -> bool:
  """Whether the path is not on this machine, so that only epath can open it."""
  return "://" in os.fspath(path)


def write(path: epath.PathLike, data: bytes) -> None:
  """Writes a file as `<path>.<process>.partial`, then renames it.

  The bytes are on the disk before the name is, so that not even a power cut
  leaves half a file. In a bucket it writes directly: an object appears when it
  is complete. The folder is created if needed.

  Raises:
    InputError: the disk is full.
  """
  target = epath.Path(path)
  if is_remote(target):
    target.write_bytes(data)
    return
  partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
  with name_full_disk(path):
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
      partial.write_bytes(data)
      _sync(partial)
      partial.replace(target)
      _sync(target.parent)
    except OSError:
      partial.unlink(missing_ok=True)
      raise


@contextlib.contextmanager
def name_full_disk(path: epath.PathLike) -> Iterator[None]:
  """Turns what a full disk, or a quota, raises into an error with the path.

  Raises:
    InputError: the disk is full.
  """
  try:
    yield
  except (OSError, ValueError) as error:
    number = getattr(error, "errno", None)
    # The second is the error of tensorstore, which orbax writes arrays with.
    if number in (errno.ENOSPC, errno.EDQUOT) or (
      "RESOURCE_EXHAUSTED" in str(error)
    ):
      raise disk_full(path) from error
    raise


def sync_tree(folder: epath.Path) -> None:
  """Waits until all of a folder is on the disk; does nothing in a bucket."""
  if not is_remote(folder):
    for path in _walk(folder):
      _sync(path)
      _sync(path.parent)
    _sync(folder.parent)


def digest_tree(folder: epath.Path) -> str:
  """Returns the sha256 of the names and bytes of all files in a folder.

  Raises:
    InputError: see `check_regular`.
  """
  total = hashlib.sha256()
  for path in _walk(folder):
    check_regular(path)
    total.update(os.fspath(path).removeprefix(os.fspath(folder)).encode())
    total.update(hashlib.sha256(path.read_bytes()).digest())
  return total.hexdigest()


def digest_arrays(arrays: Iterable[tuple[str, Any]]) -> str:
  """Returns the sha256 of names, types, shapes and bytes of arrays."""
  total = hashlib.sha256()
  for name, array in arrays:
    value = np.asarray(array)
    total.update(f"{name} {value.dtype} {value.shape}".encode())
    # As bytes, because not every type of ml_dtypes can be read as a buffer.
    total.update(np.ascontiguousarray(value).view(np.uint8).data)
  return total.hexdigest()


def read_json(
  path: epath.PathLike,
  advice: str = "put a copy of it back, or use another --workdir",
) -> dict[str, Any]:
  """Reads a JSON object.

  Args:
    path: of the file.
    advice: what to do where it is damaged.

  Raises:
    InputError: the file is empty, cut off, or anything else.
  """
  check_regular(path)
  data = epath.Path(path).read_bytes()
  try:
    value = json.loads(data)
  except (ValueError, RecursionError) as error:
    reason = str(error) if data.strip() else "it is empty"
    raise errors.InputError(
      f"{path} is damaged: it is not a JSON object ({reason}); {advice}"
    ) from error
  if not isinstance(value, dict):
    raise errors.InputError(
      f"{path} is damaged: it holds {str(value)[:40]!r} instead of a JSON "
      f"object; {advice}"
    )
  return value


def check_regular(path: epath.PathLike) -> None:
  """Refuses pipes, devices and folders, which could be read for ever.

  Raises:
    InputError: the path exists, on this machine, and is no regular file.
  """
  if not is_remote(path) and os.path.exists(path) and not os.path.isfile(path):
    raise errors.InputError(f"{path} is not a regular file; give one that is")


def lock(path: epath.PathLike) -> IO[str] | None:
  """Locks a file until the result is closed, or the process ends or is killed.

  Returns:
    None where nothing can be locked: in a bucket, and on disks without locks.

  Raises:
    InputError: another process holds the lock, says which; or the path is no
      regular file.
  """
  if is_remote(path):
    return None
  check_regular(path)
  with contextlib.ExitStack() as stack:
    file = stack.enter_context(open(path, "a+"))
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise errors.InputError(
        f"{os.path.dirname(path)} is in use by "
        f"{_read_owner(file) or 'another process'}; wait until that ends, or "
        "use another --workdir"
      ) from error
    except OSError:
      return None
    start = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    with name_full_disk(path):
      file.truncate(0)
      file.write(
        f"process {os.getpid()} on {socket.gethostname()} since {start}"
      )
      file.flush()
    stack.pop_all()  # it stays open
    return file


def _read_owner(file: IO[str], seconds: float = 5.0) -> str:
  """Returns what the owner of a lock wrote; it writes just after it locks."""
  deadline = time.monotonic() + seconds
  while True:
    time.sleep(0.1)
    file.seek(0)
    owner = file.read()
    if owner or time.monotonic() > deadline:
      return owner


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
  """Yields the files in a folder and below, in the order of their names."""
  for path in sorted(folder.iterdir()):
    if path.is_dir():
      yield from _walk(path)
    else:
      yield path


def _sync(path: epath.Path) -> None:
  """Waits until a file, or the names in a folder, are on the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError as error:
    # Some mounted storage cannot do this, above all for folders.
    if error.errno not in (errno.EINVAL, errno.ENOTSUP):
      raise
  finally:
    os.close(descriptor)


def fetch(path: epath.PathLike) -> str:
  """Returns the path of a local file; copies a remote file to this machine.

  Args:
    path: of a file. The copy of a remote file is deleted when the program ends.

  Raises:
    InputError: the file does not exist, or is a folder, a pipe or a device.
  """
  source = absolute(path) if is_remote(path) else epath.Path(path).expanduser()
  if source.is_dir():
    raise errors.InputError(f"{path} is a folder; give a file in it")
  if not source.exists():
    raise errors.InputError(
      f"no weights file {path} (looked in {os.getcwd()}); check the path"
    )
  if not is_remote(source):
    check_regular(source)
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

"""Keeps compiled programs on the disk, where later processes find them."""

import os

import filelock
import jax
from etils import epath

from pqf_jax import errors
from pqf_jax.runtime import files, progress

AUTO, OFF = "auto", "off"
# Programs that took less to compile are not kept: with each that is, jax looks
# at all others, 50 us each.
LEAST_SECONDS = 0.1


def keep_programs(place: str, megabytes: int) -> None:
  """Says where compiled programs are kept; call it before any is compiled.

  A program is found by its code, jaxlib, XLA's flags and the features of the
  processor, so processes and machines of all kinds may share a folder. Of the
  processes of one job only the first writes. Who can write there can make this
  program run anything.

  Args:
    place: a folder; 'auto', that of `JAX_COMPILATION_CACHE_DIR` or else
      pqf_jax/ in the user's cache folder, if it can be written; or 'off'.
    megabytes: programs that were not used for longest are deleted beyond so
      many. There is no limit in a bucket.

  Raises:
    InputError: the folder cannot be written.
  """
  if place == OFF:
    jax.config.update("jax_enable_compilation_cache", False)
    return
  if place == AUTO:
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
      return
    place_of_user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = files.absolute(place_of_user) / "pqf_jax"
  else:
    folder = files.absolute(place)
  if not files.is_remote(folder):
    try:
      folder.mkdir(mode=0o700, parents=True, exist_ok=True)
      _drop_unfinished(folder)
    except (OSError, NotImplementedError) as error:
      problem = f"compiled programs cannot be kept in {folder} ({error})"
      if place != AUTO:
        raise errors.InputError(
          f"{problem}; give --config.compilation_cache=FOLDER or off"
        ) from error
      progress.say(problem)
      return
  limit = -1 if files.is_remote(folder) else megabytes * 10**6
  jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
  jax.config.update("jax_compilation_cache_max_size", limit)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)


def _drop_unfinished(folder: epath.Path) -> None:
  """Deletes programs that a process did not live to write whole.

  jax writes a program, then the time of its use, both under a lock. It would
  neither replace a program without a time, nor keep any other.
  """
  with filelock.FileLock(folder / ".lockfile", timeout=10):
    for program in folder.glob("*-cache"):
      time_of_use = program.name.removesuffix("cache") + "atime"
      if not (folder / time_of_use).exists():
        program.unlink()

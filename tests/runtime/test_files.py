"""Files: written whole or not at all."""

import errno
import fcntl
import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest

from pqf_jax import errors
from pqf_jax.runtime import files


def test_a_file_is_replaced_whole(tmp_path):
  path = tmp_path / "folder" / "file"
  for data in (b"first", b"second"):
    files.write(path, data)
    assert path.read_bytes() == data
  assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "file"
  files.write(path, b"old")

  def full(self, data):
    pathlib.Path(self).touch()
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(type(files.epath.Path(path)), "write_bytes", full)
  with pytest.raises(errors.InputError, match="no space is left for .*file"):
    files.write(path, b"new")
  assert path.read_bytes() == b"old"
  assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
  path, events = tmp_path / "file", []
  sync, replace = os.fsync, os.replace

  def spy_sync(descriptor):
    events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    sync(descriptor)

  def spy_replace(source, target):
    events.append("renamed")
    assert os.fspath(source) in events and os.fspath(target) == str(path)
    replace(source, target)

  monkeypatch.setattr(os, "fsync", spy_sync)
  monkeypatch.setattr(os, "replace", spy_replace)
  monkeypatch.setattr(pathlib.Path, "replace", spy_replace)
  files.write(path, b"data")
  # The name itself is in the folder.
  assert "renamed" in events and events[-1] == str(tmp_path)


@pytest.mark.parametrize(
  "content", [b"", b"\0" * 9, b'{"a": 1', b"[]", b"5", b"\xff", b"[" * 99999]
)
def test_what_is_no_json_object_is_refused(tmp_path, content):
  (tmp_path / "a.json").write_bytes(content)
  with pytest.raises(errors.InputError, match="a.json is damaged: ") as caught:
    files.read_json(tmp_path / "a.json")
  assert "\n" not in str(caught.value)


def test_a_lock_is_held_once_and_names_its_holder(tmp_path):
  held = files.lock(tmp_path / "lock")
  with pytest.raises(errors.InputError, match=f"process {os.getpid()} on "):
    files.lock(tmp_path / "lock")
  held.close()
  files.lock(tmp_path / "lock").close()
  assert files.lock("gs://bucket/lock") is None


def test_an_owner_that_has_locked_and_not_yet_written_is_waited_for(tmp_path):
  with open(tmp_path / "lock", "a+") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    write = threading.Timer(
      0.5, lambda: print("process 7", file=file, flush=True)
    )
    write.start()
    with pytest.raises(errors.InputError, match="in use by process 7"):
      files.lock(tmp_path / "lock")
    write.join()


def test_the_lock_of_a_killed_process_is_free(tmp_path):
  code = (
    "import sys, time; from pqf_jax.runtime import files; "
    "held = files.lock(sys.argv[1]); print(flush=True); time.sleep(600)"
  )
  with subprocess.Popen(
    [sys.executable, "-c", code, tmp_path / "lock"], stdout=subprocess.PIPE
  ) as holder:
    holder.stdout.readline()
    with pytest.raises(errors.InputError, match=f"process {holder.pid} on "):
      files.lock(tmp_path / "lock")
    holder.send_signal(signal.SIGKILL)
  files.lock(tmp_path / "lock").close()


def test_a_write_that_the_disk_cannot_hold_is_refused_before(tmp_path):
  files.check_space(tmp_path, 1)
  files.check_space("gs://bucket/run", 10**18)
  with pytest.raises(errors.InputError, match="no space is left for"):
    files.check_space(tmp_path, 10**18)

"""Files: written whole or not at all."""

import errno
import pathlib

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


def test_a_write_that_the_disk_cannot_hold_is_refused_before(tmp_path):
  files.check_space(tmp_path, 1)
  files.check_space("gs://bucket/run", 10**18)
  with pytest.raises(errors.InputError, match="no space is left for"):
    files.check_space(tmp_path, 10**18)

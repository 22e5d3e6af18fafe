"""Checkpoints: a stage is done once its record is there, or it is not."""

import errno
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pqf_jax import errors
from pqf_jax.core import blocks, trees, vq_array
from pqf_jax.runtime import checkpoint


def _tree(value=1.0):
  node = vq_array.VQArray(
    jnp.full((4, 2), value),
    jnp.zeros((3, 4), jnp.uint8),
    (8, 3),
    blocks.BlockSpec(2),
  )
  # `split_trainable` leaves None in the place of other leaves.
  return {"kernel": node, "none": None, "step": jnp.zeros((), jnp.int32)}


def test_a_finished_stage_is_not_computed_again(tmp_path):
  def compute():
    return _tree(), {"note": "first"}

  for function in (compute, lambda: pytest.fail("computed again")):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    tree, record = checkpoints.restore_or_compute(
      "a", trees.shapes(_tree()), function
    )
    assert record == {"note": "first"}
    assert jax.tree.structure(tree) == jax.tree.structure(_tree())
    jax.tree.map(np.testing.assert_array_equal, tree, _tree())


def test_a_stage_without_its_record_does_not_count(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path)
  checkpoints.save("a", _tree(1), {})
  (tmp_path / "checkpoints/a.json").unlink()
  assert checkpoints.restore("a", _tree()) is None
  tree, _ = checkpoints.restore_or_compute("a", _tree(), lambda: (_tree(2), {}))
  np.testing.assert_array_equal(tree["kernel"].codebook, 2)


def _save_progress(folder, *steps):
  checkpoints = checkpoint.Checkpoints(folder)
  for step in steps:
    checkpoints.save_progress("a", step, _tree(step), {"step": step})
  return checkpoints


def _progress(folder):
  """Returns the step of the progress that a new run goes on from."""
  restored = checkpoint.Checkpoints(folder).restore_progress("a", _tree())
  tree, record = restored
  np.testing.assert_array_equal(tree["kernel"].codebook, record["step"])
  return record["step"]


def _records(folder):
  return sorted(path.name for path in (folder / "checkpoints").glob("*.json"))


def test_only_the_two_latest_states_of_progress_are_kept(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path)
  assert checkpoints.restore_progress("a", _tree()) is None
  _save_progress(tmp_path, 8, 9, 10)
  assert _progress(tmp_path) == 10
  assert _records(tmp_path) == ["a@10.json", "a@9.json"]
  assert len(list((tmp_path / "checkpoints").iterdir())) == 4


def _truncate_files(folder, name):
  for file in (folder / name).rglob("*"):
    if file.is_file():
      file.write_bytes(b"")


def _flip_a_data_bit(folder, name):
  file = max((folder / name).rglob("d/*"), key=lambda path: path.stat().st_size)
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 4
  file.write_bytes(data)


DAMAGES = {
  "files": _truncate_files,
  "bit": _flip_a_data_bit,
  "arrays gone": lambda folder, name: shutil.rmtree(folder / name),
  "record": lambda folder, name: (folder / f"{name}.json").write_text(""),
  "half": lambda folder, name: (folder / f"{name}.json").write_text('{"st'),
  "list": lambda folder, name: (folder / f"{name}.json").write_text("[]"),
  "old": lambda folder, name: (folder / f"{name}.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_progress_falls_back_to_the_one_before(
  tmp_path, damage, capsys
):
  _save_progress(tmp_path, 5, 10)
  DAMAGES[damage](tmp_path / "checkpoints", "a@10")
  assert _progress(tmp_path) == 5
  assert "a@10 is damaged" in capsys.readouterr().out
  # What is saved then takes the place of the damaged one.
  _save_progress(tmp_path, 7)
  assert _progress(tmp_path) == 7
  assert _records(tmp_path) == ["a@5.json", "a@7.json"]
  DAMAGES[damage](tmp_path / "checkpoints", "a@7")
  DAMAGES[damage](tmp_path / "checkpoints", "a@5")
  with pytest.raises(errors.InputError, match="a@5 is damaged") as caught:
    _progress(tmp_path)
  assert "delete" not in str(caught.value)
  checkpoint.Checkpoints(tmp_path).drop_progress("a")
  assert not list((tmp_path / "checkpoints").iterdir())


def test_a_damaged_state_is_saved_again_at_the_same_step(tmp_path):
  _save_progress(tmp_path, 5, 10)
  _flip_a_data_bit(tmp_path / "checkpoints", "a@10")
  _save_progress(tmp_path, 10)
  assert _progress(tmp_path) == 10
  assert _records(tmp_path) == ["a@10.json", "a@5.json"]


@pytest.mark.parametrize("name", ["a@5 (1)", "a@", "a@-1", "a@5.1"])
def test_a_foreign_file_among_progress_is_named(tmp_path, name):
  _save_progress(tmp_path, 5)
  (tmp_path / f"checkpoints/{name}.json").write_text("{}")
  with pytest.raises(errors.InputError, match="is not a file of this program"):
    _progress(tmp_path)


def test_no_flipped_bit_is_restored_as_something_else(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path)
  weights = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
  tree, record = {"x": jnp.asarray(weights)}, {"seconds": 1.5, "best": {"1": 2}}
  checkpoints.save("a", tree, record)
  paths = [path for path in tmp_path.rglob("*") if path.is_file()]
  rng, num_refused = random.Random(0), 0
  for _ in range(200):
    path = rng.choice(paths)
    whole = path.read_bytes()
    bit = rng.randrange(8 * len(whole) or 1)
    damaged = bytearray(whole or b"\0")
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)
    try:
      restored, stored = checkpoints.restore("a", tree)
    except errors.InputError as error:
      num_refused += 1
      assert "\n" not in str(error) and "delete" not in str(error)
    else:  # such as a space for a tab in the record
      np.testing.assert_array_equal(restored["x"], weights)
      assert stored == record
    path.write_bytes(whole)
  assert num_refused > 150
  assert checkpoints.restore("a", tree) is not None


def test_progress_is_dropped_with_the_finished_stage(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path)
  checkpoints.save_progress("a", 1, _tree(), {})
  checkpoints.restore_or_compute("a", _tree(), lambda: (_tree(), {}))
  assert not list((tmp_path / "checkpoints").glob("a@*"))


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path)
  checkpoints.save("a", {"x": jnp.ones(3)}, {})
  with pytest.raises(errors.InputError, match="does not fit"):
    checkpoints.restore("a", {"x": jnp.ones(4)})
  with pytest.raises(errors.InputError, match="does not fit"):
    checkpoints.restore("a", {"y": jnp.ones(3)})


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_stage_is_named_alone(tmp_path, damage):
  checkpoints = checkpoint.Checkpoints(tmp_path)
  checkpoints.save("a", _tree(), {})
  checkpoints.save("b", _tree(), {})
  DAMAGES[damage](tmp_path / "checkpoints", "b")
  with pytest.raises(
    errors.InputError, match="/b is damaged .*b.json"
  ) as found:
    checkpoints.restore("b", _tree())
  assert "delete" not in str(found.value) and "\n" not in str(found.value)
  assert checkpoints.restore("a", _tree()) is not None


FULL_DISKS = {
  # The message of tensorstore on a file system of 10 MB.
  "arrays": ValueError(
    "RESOURCE_EXHAUSTED: Failed to write 11718656 bytes to file 11: No "
    "space left on device [os_error_code='28']"
  ),
  # Of what orbax writes beside them.
  "metadata": OSError(errno.ENOSPC, "No space left on device"),
  "quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
}


@pytest.mark.parametrize("error", FULL_DISKS.values(), ids=FULL_DISKS)
def test_a_full_disk_is_named_and_the_earlier_save_kept(
  tmp_path, monkeypatch, error
):
  checkpoints = checkpoint.Checkpoints(tmp_path)
  checkpoints.save("a", _tree(1), {})

  def full(*args, **kwargs):
    raise error

  monkeypatch.setattr("orbax.checkpoint.StandardCheckpointer.save", full)
  with pytest.raises(errors.InputError, match="no space is left for .*/b"):
    checkpoints.save("b", _tree(2), {})
  assert checkpoints.restore("b", _tree()) is None
  assert checkpoints.restore("a", _tree()) is not None

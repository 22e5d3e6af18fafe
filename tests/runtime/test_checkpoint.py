"""Checkpoints: a stage is done once its record is there, or it is not."""

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


def test_only_the_latest_progress_is_kept(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path)
  assert checkpoints.restore_progress("a", _tree()) is None
  for step in (9, 10):
    checkpoints.save_progress("a", step, _tree(step), {"step": step})
  tree, record = checkpoint.Checkpoints(tmp_path).restore_progress("a", _tree())
  assert record == {"step": 10}
  np.testing.assert_array_equal(tree["kernel"].codebook, 10)
  assert len(list((tmp_path / "checkpoints").iterdir())) == 2


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


def test_a_damaged_checkpoint_is_refused(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path)
  checkpoints.save("a", {"x": jnp.ones(3)}, {})
  for file in (tmp_path / "checkpoints/a").rglob("*"):
    if file.is_file():
      file.write_bytes(b"")
  with pytest.raises(errors.InputError, match="damaged"):
    checkpoints.restore("a", {"x": jnp.ones(3)})


def test_a_full_disk_is_named_and_the_earlier_save_kept(tmp_path, monkeypatch):
  checkpoints = checkpoint.Checkpoints(tmp_path)
  checkpoints.save("a", _tree(1), {})

  def full(*args, **kwargs):
    # The message of tensorstore on a file system of 10 MB.
    raise ValueError(
      "RESOURCE_EXHAUSTED: Failed to write 11718656 bytes to file 11: No "
      "space left on device [os_error_code='28']"
    )

  monkeypatch.setattr("orbax.checkpoint.StandardCheckpointer.save", full)
  with pytest.raises(errors.InputError, match="no space is left for .*/b"):
    checkpoints.save("b", _tree(2), {})
  assert checkpoints.restore("b", _tree()) is None
  assert checkpoints.restore("a", _tree()) is not None

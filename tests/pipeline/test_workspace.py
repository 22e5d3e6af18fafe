import pytest

from configs import resnet18
from pqf_jax import errors
from pqf_jax.pipeline import workspace


def _claim(folder, **changes):
  config = resnet18.get_config()
  config.update(changes)
  workspace.Workspace(str(folder), config).claim()


def test_a_workdir_belongs_to_one_config(tmp_path):
  _claim(tmp_path)
  _claim(tmp_path)
  with pytest.raises(errors.InputError, match="seed: 0 there, 1 now"):
    _claim(tmp_path, seed=1)


def test_processes_may_find_each_other_in_another_way(tmp_path):
  _claim(tmp_path, distributed="on")
  _claim(tmp_path, distributed="off", distributed_timeout=7)

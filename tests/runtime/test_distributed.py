"""Distributed: the laws that one process can check."""

import jax
import numpy as np
import pytest

from pqf_jax import errors
from pqf_jax.runtime import distributed


@pytest.mark.parametrize("num_processes", [1, 3, 20])
def test_work_is_divided_once_and_evenly(monkeypatch, num_processes):
  monkeypatch.setattr(jax, "process_count", lambda: num_processes)
  costs = {f"layer{n}": float(1 + n % 7) for n in range(17)}
  names = distributed.divide_work(costs)
  assert len(names) == num_processes
  assert sorted(name for part in names for name in part) == sorted(costs)
  loads = [sum(costs[name] for name in part) for part in names]
  # The largest piece of work bounds the difference of any two processes.
  assert max(loads) - min(loads) <= max(costs.values())


def test_one_process_gathers_its_own():
  tree = {"a": np.arange(3.0)}
  shapes = {"a": jax.ShapeDtypeStruct((3,), float)}
  gathered = distributed.gather_trees([["a"]], tree, shapes)
  np.testing.assert_array_equal(gathered["a"], tree["a"])
  assert distributed.gather_records({"a": [1, None]}) == {"a": [1, None]}
  assert distributed.gather_lists(["a", 2]) == ["a", 2]


def test_replication_is_undone():
  tree = {"a": np.arange(6.0, dtype=np.float32), "b": np.int32(3)}
  copies = distributed.unreplicate(distributed.replicate(tree))
  jax.tree.map(np.testing.assert_array_equal, copies, tree)


@pytest.mark.parametrize("batch_size", [3, 11, 13])
def test_a_batch_that_does_not_divide_names_sizes_that_do(batch_size):
  with pytest.raises(errors.InputError, match="4 devices") as error:
    distributed.check_batch_size("config.size", batch_size, 4)
  sizes = str(error.value).rpartition("choose ")[2].split(" or ")
  for size in map(int, sizes):
    assert size > 0 and abs(size - batch_size) < 4
    distributed.check_batch_size("config.size", size, 4)


def test_processes_that_differ_are_named(monkeypatch):
  facts = [{"code": "x", "seed": 1}, {"code": "x", "seed": 2}]
  monkeypatch.setattr(distributed, "_gather_json", lambda value: facts)
  with pytest.raises(
    errors.InputError, match="seed is 1 on process 0 and 2 on 1;"
  ):
    distributed.check_agreement(facts[0])


def test_start_refuses_an_unknown_mode_and_a_malformed_variable(monkeypatch):
  with pytest.raises(errors.InputError, match="'yes'; it must be one of"):
    distributed.start("yes", timeout_seconds=1)
  monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
  with pytest.raises(errors.InputError, match="^JAX_NUM_PROCESSES is 'two'"):
    distributed.start("on", timeout_seconds=1)

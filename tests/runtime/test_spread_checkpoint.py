"""Arrays that are spread over devices are saved and restored in parts."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests import host_devices

ROOT = pathlib.Path(__file__).parents[2]


def _run(folder, *, processes, devices):
  """Returns what each process of `main` prints."""
  shared = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
  }
  started = [
    subprocess.Popen(
      [sys.executable, "-m", "tests.runtime.test_spread_checkpoint", folder],
      cwd=ROOT,
      env=shared | own,
      stdout=subprocess.PIPE,
      text=True,
    )
    for own in host_devices.job(processes)
  ]
  printed = [one.communicate(timeout=120)[0] for one in started]
  return [json.loads(text.splitlines()[-1]) for text in printed]


@pytest.mark.slow
def test_two_processes_write_and_read_their_parts(tmp_path):
  for found in _run(str(tmp_path), processes=2, devices=2):
    assert found["processes"] == 2
    assert found["differ"] == []
    assert found["parts"] == {"cut": [1, 4], "whole": [1], "local": [1]}


def test_one_process_reads_what_it_wrote(tmp_path):
  (found,) = _run(str(tmp_path), processes=1, devices=2)
  assert found["differ"] == []
  assert found["parts"] == {"cut": [1, 2], "whole": [1], "local": [1]}
  assert found["num_devices"] == {"cut": 2, "whole": 2, "local": 1}


def main(folder: str) -> None:
  """Saves and restores a tree, and prints what came back."""
  import jax
  import numpy as np
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  from pqf_jax.runtime import checkpoint, distributed

  distributed.start("on", timeout_seconds=60)
  mesh = Mesh(np.array(jax.devices()), ("model",))
  values = {
    "cut": np.arange(24, dtype=np.float32).reshape(3, 8),
    "whole": np.arange(5, dtype=np.uint8),
    "local": np.arange(3),
  }
  specs = {"cut": (None, "model"), "whole": ()}
  tree = dict(values)
  for name, spec in specs.items():
    place = NamedSharding(mesh, PartitionSpec(*spec))
    tree[name] = jax.make_array_from_callback(
      values[name].shape, place, lambda index, name=name: values[name][index]
    )
  saved = checkpoint.Checkpoints(folder)
  saved.save("a", tree, {})
  restored, _ = saved.restore("a", tree)
  differ = [
    name
    for name, leaf in restored.items()
    for shard in leaf.addressable_shards
    if not np.array_equal(shard.data, values[name][shard.index])
  ]
  found = {
    "processes": jax.process_count(),
    "differ": differ,
    "parts": {
      name: np.floor_divide(
        leaf.shape, leaf.sharding.shard_shape(leaf.shape)
      ).tolist()
      for name, leaf in restored.items()
    },
    "num_devices": {
      name: len(leaf.devices()) for name, leaf in restored.items()
    },
  }
  sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
  main(sys.argv[1])

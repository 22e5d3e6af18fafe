"""The same bits on any number of devices.

The tests need 8 devices; the last one, on fewer, runs them in a process that
has 8 on a CPU.
"""

import functools
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pqf_jax import kmeans
from tests.kmeans import cases

NUM_DEVICES = 8
needs_devices = pytest.mark.skipif(
  jax.device_count() < NUM_DEVICES, reason=f"needs {NUM_DEVICES} devices"
)
run = functools.partial(
  kmeans.annealed_kmeans, jax.random.key(0), num_codes=64, num_steps=20
)


def _mesh(count):
  return Mesh(np.array(jax.devices()[:count]), ("n",))


@pytest.fixture(scope="module")
def vectors():
  return cases.normal(20000, 9, scale=1)


@pytest.fixture(scope="module")
def on_one(vectors):
  return run(vectors)


@needs_devices
@pytest.mark.parametrize("count", [1, 2, NUM_DEVICES])
def test_a_mesh_of_any_size(vectors, on_one, count):
  spread = run(vectors, mesh=_mesh(count))
  assert len(spread.codes) == len(vectors)
  cases.assert_same(on_one, spread)
  np.testing.assert_allclose(on_one.distortion, spread.distortion, rtol=1e-6)


@needs_devices
def test_a_layer_with_an_outlier(vectors):
  vectors = vectors.copy()
  vectors[7] = 1e5
  alone, spread = run(vectors), run(vectors, mesh=_mesh(NUM_DEVICES))
  assert len(set(np.asarray(alone.codes))) == 64
  cases.assert_same(alone, spread)


@needs_devices
def test_layers_that_share_a_mesh(vectors):
  layers = [vectors, vectors[:3000], vectors[3000:16000], vectors[:64]]
  several = functools.partial(
    kmeans.kmeans_of_layers,
    cases.split_keys(4),
    layers,
    num_codes=64,
    num_steps=20,
  )
  for here, spread in zip(several(), several(mesh=_mesh(8)), strict=True):
    cases.assert_same(here, spread)


@needs_devices
def test_sub_vectors_that_are_spread_already(vectors):
  mesh = _mesh(NUM_DEVICES)
  vectors = vectors[:16384]
  alone = run(vectors)
  split = jax.device_put(vectors, NamedSharding(mesh, PartitionSpec("n")))
  assert len(split.sharding.device_set) == NUM_DEVICES
  for spread in (run(split), run(split, mesh=mesh)):
    np.testing.assert_array_equal(spread.codes, alone.codes)
  np.testing.assert_array_equal(
    kmeans.assign(split, alone.codebook), kmeans.assign(vectors, alone.codebook)
  )


@needs_devices
def test_one_copy_is_enough_of_sub_vectors_that_all_devices_have(vectors):
  vectors = vectors[:16384]
  everywhere = NamedSharding(_mesh(NUM_DEVICES), PartitionSpec())
  copied = run(jax.device_put(vectors, everywhere))
  assert len(copied.codes.sharding.device_set) == 1
  np.testing.assert_array_equal(copied.codes, run(vectors).codes)


@pytest.mark.slow
def test_these_on_eight_devices_of_a_cpu():
  flags = f"--xla_force_host_platform_device_count={NUM_DEVICES}"
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
  subprocess.run(
    [sys.executable, "-m", "pytest", "-q", __file__],
    env=environment,
    check=True,
  )

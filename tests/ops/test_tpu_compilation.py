"""Compiles for TPUs without one, where libtpu is installed."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

_COMPILE = """
import functools, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pqf_jax.ops import annealing, iteration, packing, relaxation

topology = topologies.get_topology_desc(
  platform="tpu", topology_name=sys.argv[1])
one = Mesh(np.array(topology.devices[:1]), ("devices",))
four = topologies.make_mesh(topology, (4,), ("devices",))

count = 16384
for length, num_codes, mesh in [(9, 256, one), (4, 2048, one), (9, 256, four)]:
  place = NamedSharding(mesh, PartitionSpec())

  def spec(array):
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)

  vectors = jax.ShapeDtypeStruct((count, length), jnp.float32)
  arguments = (
    jax.eval_shape(
      lambda v: packing.pack([v], num_shards=mesh.size), vectors),
    jax.ShapeDtypeStruct((1, num_codes, length), jnp.float32),
    annealing.Schedule(
      jax.ShapeDtypeStruct((3, 1), jnp.float32),
      jax.ShapeDtypeStruct((3,), jnp.float32)),
    jax.ShapeDtypeStruct((3, 1, num_codes, length), jnp.bfloat16),
  )
  fit = functools.partial(
    relaxation.fit,
    options=iteration.Options(count // mesh.size, num_transfers=2),
    mesh=mesh if mesh.size > 1 else None)
  compiled = jax.jit(fit).lower(*jax.tree.map(spec, arguments)).compile()
  assert compiled.as_text().count("tpu_custom_call") > 1
  temporary = compiled.memory_analysis().temp_size_in_bytes
  # Rows of two words, padded to 128, once a call; not of K scores.
  assert temporary < 600 * count, (length, num_codes, temporary)
"""


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="needs libtpu"
)
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_the_loop_compiles_without_a_matrix_of_all_pairs(topology):
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
  }
  subprocess.run(
    [sys.executable, "-c", _COMPILE, topology],
    env=environment,
    check=True,
    timeout=300,
  )

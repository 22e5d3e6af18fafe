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
from pqf_jax.core import blocks, vq_array
from pqf_jax.ops import annealing, iteration, packing, relaxation

topology = topologies.get_topology_desc(
  platform="tpu", topology_name=sys.argv[1])
one = Mesh(np.array(topology.devices[:1]), ("devices",))
four = topologies.make_mesh(topology, (4,), ("devices",))

count = 16384
for length, num_codes, mesh, num_own in [
  (9, 256, one, 0), (9, 256, one, 8), (4, 2048, one, 0), (9, 256, four, 0)]:
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
      jax.ShapeDtypeStruct((3, 1), jnp.float32)),
    jax.ShapeDtypeStruct((3, 1, num_codes, length), jnp.bfloat16),
  )
  fit = functools.partial(
    relaxation.fit,
    options=iteration.Options(count // mesh.size, 2, num_own),
    mesh=mesh if mesh.size > 1 else None)
  compiled = jax.jit(fit).lower(*jax.tree.map(spec, arguments)).compile()
  assert compiled.as_text().count("tpu_custom_call") > 1
  temporary = compiled.memory_analysis().temp_size_in_bytes
  # Rows of two words, padded to 128, once a call; not of K scores.
  assert temporary < 600 * count, (length, num_codes, temporary)

def loss(codebook, codes, images):
  kernel = vq_array.VQArray(
    codebook, codes, (1, 1, 2048, 512), blocks.BlockSpec(4)).decode()
  return jnp.square(images @ kernel[0, 0]).sum()

place = NamedSharding(one, PartitionSpec())
arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=place)
  for shape, dtype in [((256, 4), jnp.float32), ((512, 512), jnp.uint8),
                       ((64, 2048), jnp.float32)]]
compiled = jax.jit(jax.grad(loss)).lower(*arguments).compile()
# The kernel has 4 MB; rows of 4 numbers, padded to 128, would have 134.
assert compiled.memory_analysis().temp_size_in_bytes < 3e7
"""


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="needs libtpu"
)
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_nothing_is_stored_that_grows_with_all_pairs_or_is_padded(topology):
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "PYTHONPATH": str(pathlib.Path(__file__).parents[3]),
  }
  subprocess.run(
    [sys.executable, "-c", _COMPILE, topology],
    env=environment,
    check=True,
    timeout=300,
  )

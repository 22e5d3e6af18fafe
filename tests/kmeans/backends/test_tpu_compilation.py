"""Compiles for TPUs without one, where libtpu is installed."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pqf_jax.core import blocks, vq_array
from pqf_jax.kmeans import annealing, batching, loop

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="needs libtpu"
)


@pytest.fixture(params=["v5e:2x2", "v6e:2x2"])
def topology(request, monkeypatch):
  # Else libtpu looks for a TPU, and allows one process only.
  monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  return topologies.get_topology_desc(
    platform="tpu", topology_name=request.param
  )


def _mesh(topology, count):
  return Mesh(np.array(topology.devices[:count]), ("devices",))


def _compiled(function, arguments, mesh):
  place = NamedSharding(mesh, PartitionSpec())
  arguments = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments
  )
  return jax.jit(function).lower(*arguments).compile()


@pytest.mark.parametrize(
  "length, num_codes, num_devices, num_hartigan_tiles",
  [(9, 256, 1, 0), (9, 256, 1, 8), (4, 2048, 1, 0), (9, 256, 4, 0)],
)
def test_nothing_is_stored_that_grows_with_all_pairs_or_is_padded(
  topology, length, num_codes, num_devices, num_hartigan_tiles
):
  count, mesh = 16384, _mesh(topology, num_devices)
  batch = jax.eval_shape(
    lambda vectors: batching.make_batch([vectors], num_shards=num_devices),
    jax.ShapeDtypeStruct((count, length), jnp.float32),
  )
  options = loop.Options(count // num_devices, 2, num_hartigan_tiles)

  def fit(batch, *arguments):
    some = mesh if num_devices > 1 else None
    prepared = loop.prepare(batch, options=options, mesh=some)
    return loop.fit(prepared, *arguments, options=options, mesh=some)

  arguments = (
    batch,
    jax.ShapeDtypeStruct((1, num_codes, length), jnp.float32),
    annealing.make_schedule(3, [annealing.LLOYD]),
    jax.ShapeDtypeStruct((3, 1, num_codes, length), jnp.bfloat16),
  )
  compiled = _compiled(fit, arguments, mesh)
  # Rows of two words, padded to 128, once a call; not of K scores.
  assert compiled.memory_analysis().temp_size_in_bytes < 600 * count


def test_the_gradient_of_a_codebook_pads_no_rows(topology):
  def loss(codebook, codes, images):
    kernel = vq_array.VQArray(
      codebook, codes, (1, 1, 2048, 512), blocks.BlockSpec(4)
    ).decode()
    return jnp.square(images @ kernel[0, 0]).sum()

  arguments = [
    jax.ShapeDtypeStruct((256, 4), jnp.float32),
    jax.ShapeDtypeStruct((512, 512), jnp.uint8),
    jax.ShapeDtypeStruct((64, 2048), jnp.float32),
  ]
  compiled = _compiled(jax.grad(loss), arguments, _mesh(topology, 1))
  # The kernel has 4 MB; rows of 4 numbers, padded to 128, would have 134.
  assert compiled.memory_analysis().temp_size_in_bytes < 3e7

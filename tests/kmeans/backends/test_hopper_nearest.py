"""The kernel for NVIDIA Hopper, interpreted and lowered on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu

from pqf_jax import nvidia
from pqf_jax.kmeans.backends import hopper_nearest, hopper_sums
from pqf_jax.numerics import bf16_split
from tests.kmeans import cases

needs_new_jax = pytest.mark.skipif(
  jax.__version_info__ < nvidia.FIRST_JAX, reason="the kernel needs it"
)


@pytest.fixture(params=[1, 132])
def num_processors(request, monkeypatch):
  """The processors of a GPU, many of which share few tiles."""
  monkeypatch.setattr(nvidia, "NUM_PROCESSORS", request.param)


def _nearest(columns, tables, layers, excluded=None):
  return hopper_nearest.nearest(
    bf16_split.split_vectors(columns),
    tables,
    layers,
    excluded,
    interpret=mosaic_gpu.InterpretGPUParams(),
  )


# Beside the second codebook one warpgroup's sub-vectors fit, not those of four.
@needs_new_jax
@pytest.mark.usefixtures("num_processors")
@pytest.mark.parametrize(
  "length, num_codes, num_layers", [(4, 37, 2), (18, 450, 1)]
)
def test_it_agrees_with_brute_force(length, num_codes, num_layers):
  arguments, codes = cases.scored(length, num_codes, num_layers, num_tiles=2)
  np.testing.assert_array_equal(_nearest(*arguments), codes)


@needs_new_jax
@pytest.mark.usefixtures("num_processors")
@pytest.mark.parametrize("num_codes", [37, 128])
def test_it_passes_over_what_is_excluded(num_codes):
  (columns, tables, layers), codes = cases.scored(4, num_codes, 2, num_tiles=2)
  others = np.random.default_rng(0).integers(0, num_codes, codes.shape)
  excluded = np.where(others % 2, codes, others).astype(np.int32)
  chosen = _nearest(columns, tables, layers, jnp.asarray(excluded))
  vectors = np.stack(columns, axis=2).astype(np.float64)
  factors = np.float64(tables[layers])
  scores = factors[:, None, :, 0] + vectors @ factors[:, :, 1:].mT
  np.put_along_axis(scores, excluded[:, :, None], np.inf, axis=2)
  np.testing.assert_array_equal(chosen, scores.argmin(axis=2))


@needs_new_jax
@pytest.mark.parametrize(
  "length, num_codes", [(1, 1), (9, 256), (18, 256), (4, 2048), (9, 1000)]
)
def test_the_kernels_lower_for_a_gpu_without_one(length, num_codes):
  assert hopper_nearest.fits(length, num_codes)
  assert hopper_sums.fits(length + 2, num_codes)
  (columns, _, layers), _ = cases.scored(length, 1, 1, num_tiles=2)

  def kernels(vectors, tables, layers, *columns):
    codes = hopper_nearest.nearest(vectors, tables, layers)
    codes = hopper_nearest.nearest(vectors, tables, layers, codes)
    units = jnp.ones((1, len(columns)))
    return hopper_sums.sums(
      columns, codes, layers, units, tables.shape[1], num_coarse=0
    )

  traced = jax.jit(kernels).trace(
    bf16_split.split_vectors(columns),
    jnp.zeros((1, num_codes, length + 1)),
    layers,
    *columns,
  )
  traced.lower(lowering_platforms=("cuda",))


def test_a_codebook_that_exceeds_shared_memory_does_not_fit():
  assert not hopper_nearest.fits(18, 1024)
  assert not hopper_sums.fits(20, 2048)

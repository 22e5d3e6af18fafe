import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu

from pqf_jax import nvidia
from pqf_jax.kmeans import assignment, batching, hartigan
from pqf_jax.kmeans.backends import hopper_nearest
from pqf_jax.numerics import bf16_split


@pytest.fixture(
  params=[
    "any platform",
    pytest.param(
      "kernel",
      marks=pytest.mark.skipif(
        jax.__version_info__ < nvidia.FIRST_JAX,
        reason="the kernel needs it",
      ),
    ),
  ]
)
def assign(request, monkeypatch):
  """`hartigan.assign`, without or with the kernel for GPUs, interpreted."""
  if request.param == "any platform":
    return hartigan.assign
  run = functools.partial(
    hopper_nearest.nearest, interpret=mosaic_gpu.InterpretGPUParams()
  )
  monkeypatch.setattr(hopper_nearest, "nearest", run)

  def by_kernel(columns, *arguments):
    norms = sum(jnp.square(column) for column in columns)
    vectors = bf16_split.split_vectors((*columns, norms))
    return hartigan.assign(columns, *arguments, vectors=vectors)

  return by_kernel


def _assigned(assign, vectors, codes, num_codes):
  """One step over all sub-vectors, from the clusters of `codes`.

  The centroids of empty clusters are where the first sub-vector is.
  """
  counts = np.bincount(codes, minlength=num_codes)
  means = np.zeros((num_codes, vectors.shape[1]))
  np.add.at(means, codes, vectors)
  means /= np.maximum(counts, 1)[:, None]
  means[counts == 0] = vectors[0]
  batch = batching.make_batch([jnp.asarray(vectors)])
  padding = batching.TILE - len(codes)
  moved = assign(
    batching.split_columns(batch.tiles),
    jnp.asarray(means[None], jnp.float32),
    jnp.asarray(counts[None], jnp.float32),
    batch.layout.layers,
    jnp.asarray(np.pad(codes, (0, padding))[None], jnp.int32),
  )
  return np.asarray(moved)[0, : len(codes)]


def _error(vectors, codes):
  """The sum of squared distances to the means of the clusters."""
  groups = [vectors[codes == code] for code in np.unique(codes)]
  return sum(np.square(group - group.mean(axis=0)).sum() for group in groups)


@pytest.fixture(params=[0, 1])
def clustering(request):
  draws = np.random.default_rng(request.param)
  vectors = draws.standard_normal((40, 3))
  return vectors.astype(np.float32), draws.integers(0, 7, 40)


def test_each_goes_where_brute_force_finds_the_least_error(assign, clustering):
  vectors, codes = clustering
  moved = _assigned(assign, vectors, codes, 9)  # the last two are empty
  for row, code in enumerate(codes):
    alternatives = [code] if (codes == code).sum() == 1 else range(7)
    tried = [np.r_[codes[:row], j, codes[row + 1 :]] for j in alternatives]
    error = [_error(vectors.astype(np.float64), each) for each in tried]
    assert moved[row] == alternatives[int(np.argmin(error))]


def test_it_improves_on_a_result_that_k_means_cannot(assign):
  vectors = np.array([[0, 0], [3, 0], [4.6, 0]], np.float32)
  codes = np.array([0, 0, 1])
  means = np.array([[1.5, 0], [4.6, 0]], np.float32)
  np.testing.assert_array_equal(assignment.assign(vectors, means), codes)
  moved = _assigned(assign, vectors, codes, 2)
  assert moved[1] == 1
  assert _error(vectors, np.r_[0, moved[1:]]) < _error(vectors, codes)

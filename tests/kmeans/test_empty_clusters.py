import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pqf_jax.kmeans import empty_clusters


def _clusters(counts, errors):
  counts = jnp.asarray(counts, jnp.float32)
  return empty_clusters.Clusters(
    codebook=None,
    means=jnp.arange(2.0 * counts.size).reshape(-1, 2),
    counts=counts,
    errors=jnp.asarray(errors, jnp.float32),
  )


def test_split_takes_the_donors_in_order():
  clusters = _clusters([4, 0, 5, 0, 2], [8, 0, 90, 0, 16])
  proposal = empty_clusters.split_worst(clusters)
  source = np.array([0, 2, 2, 4, 4])
  np.testing.assert_array_equal(proposal.centroids, clusters.means[source])
  np.testing.assert_array_equal(proposal.counts, [4, 5, 5, 2, 2])
  np.testing.assert_allclose(
    proposal.spread[:, 0], [0, 0.3 * 3, 0, 0.3 * 2, 0], rtol=1e-6
  )


@pytest.mark.parametrize("seed", range(5))
def test_both_ways_to_find_the_donors_agree(seed):
  draws = np.random.default_rng(seed)
  priority = jnp.asarray(draws.integers(0, 9, 64), jnp.float32)  # with ties
  empty = jnp.asarray(draws.integers(0, 2, 64) > 0)
  by_sort = jax.jit(empty_clusters._sorted_donors)(priority, empty)
  by_count = jax.jit(empty_clusters._counted_donors)(priority, empty)
  np.testing.assert_array_equal(by_sort[empty], by_count[empty])

"""Rules that place the centroids of empty clusters."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

SPLIT_OFFSET = 0.3
"""Offset of a new centroid from its donor's mean, in units of the donor
cluster's root mean squared distance per dimension. 0.1 to 1 score alike."""


class Clusters(NamedTuple):
  """The statistics of one assignment; the data mean is at 0.

  Attributes:
    codebook: [K, D] float32 centroids that were assigned to.
    means: [K, D] float32 cluster means; 0 where a cluster is empty.
    counts: [K] float32 cluster sizes.
    errors: [K] float32 sums of the clusters' squared distances, to 1 %.
  """

  codebook: jax.Array
  means: jax.Array
  counts: jax.Array
  errors: jax.Array


class Proposal(NamedTuple):
  """The next centroids, before the noise of the schedule.

  Attributes:
    centroids: [K, D] float32.
    counts: [K] float32 cluster sizes that scale the noise, at least 1.
    spread: [K, 1] float32 standard deviation of a further random offset.
  """

  centroids: jax.Array
  counts: jax.Array
  spread: jax.Array


Rule = Callable[[Clusters], Proposal]
"""Proposes the next centroids, those of empty clusters included."""


def split_worst(clusters: Clusters) -> Proposal:
  """Places empty clusters next to the clusters with the largest error.

  The centroid of the i-th empty cluster moves to the mean of the cluster with
  the i-th largest sum of squared distances, plus a Gaussian offset of 0.3 times
  that cluster's root mean squared distance per dimension. Every other centroid
  moves to its mean.

  Of four rules this one ends with the least squared error
  (docs/kmeans_quality.md). Moving to the farthest sub-vectors scored alike.
  """
  return split(clusters, clusters.errors)


def split(clusters: Clusters, priority: jax.Array) -> Proposal:
  """Places empty clusters next to those with the highest `priority` [K]."""
  num_codes, length = clusters.means.shape
  empty = clusters.counts == 0
  numbers = jnp.arange(num_codes, dtype=jnp.int32)
  # The i-th empty cluster gets the donor of the i-th highest priority.
  donors = lax.platform_dependent(
    priority, empty, cpu=_sorted_donors, default=_counted_donors
  )
  source = jnp.where(empty, donors, numbers)
  counts = jnp.maximum(clusters.counts, 1)[source]
  spread = SPLIT_OFFSET * jnp.sqrt(clusters.errors[source] / counts / length)
  return Proposal(
    centroids=clusters.means[source],
    counts=counts,
    spread=jnp.where(empty, spread, 0)[:, None],
  )


def _sorted_donors(priority: jax.Array, empty: jax.Array) -> jax.Array:
  donors = lax.top_k(priority, priority.size)[1]
  turn = jnp.cumsum(empty, dtype=jnp.int32) - 1
  return donors[jnp.maximum(turn, 0)]


def _counted_donors(priority: jax.Array, empty: jax.Array) -> jax.Array:
  """Counts ranks by K x K comparisons, in fused reductions.

  A sort and a scan are several small programs on a GPU, which take longer than
  the assignment of a small layer.
  """
  numbers = jnp.arange(priority.size, dtype=jnp.int32)
  before = numbers[None, :] < numbers[:, None]
  higher = priority[None, :] > priority[:, None]
  equal = priority[None, :] == priority[:, None]
  # Two counts below K in one number below K^2: a pass less.
  ahead = (higher | (equal & before)).astype(jnp.uint32)
  empties = (empty[None, :] & before).astype(jnp.uint32)
  base = jnp.uint32(priority.size)
  both = (ahead + base * empties).sum(axis=1, dtype=jnp.uint32)
  turn, rank = jnp.divmod(both, base)
  chosen = rank[None, :] == turn[:, None]
  return jnp.where(chosen, numbers[None, :], 0).sum(axis=1, dtype=jnp.int32)

"""Hartigan's transfers: single sub-vectors move where the total error falls.

K-means ends where every sub-vector is nearest to its own centroid, which the
sub-vector itself has drawn towards it. What a move really saves accounts for
both centroids following it (Hartigan, Clustering Algorithms, 1975, chapter 4):
from cluster i with n_i members to j, the total squared error changes by

    n_j / (n_j + 1) |x - c_j|^2  -  n_i / (n_i - 1) |x - c_i|^2

where c are the means. Where clusters are small these factors matter: at 8
sub-vectors a centroid, what k-means cannot improve any more transfers improve
by 1.5 % (docs/kmeans_quality.md).

With w instead of 1 this is a rule between k-means (w = 0) and Hartigan's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from pqf_jax.ops import nearest

# The weight of a centroid to which nothing may move.
_CLOSED = 1e38


def transfer(
  columns: Sequence[jax.Array],
  means: jax.Array,
  counts: jax.Array,
  layers: jax.Array,
  codes: jax.Array,
  *,
  weight: float = 1.0,
) -> jax.Array:
  """Moves each sub-vector to the cluster where it costs least.

  Each is judged as if it moved alone. Empty clusters take none: all would see
  the same bargain.

  Args:
    columns: D arrays [B, 1024] float32, from `nearest.split_columns`.
    means: [L, K, D] float32, of the clusters, or other centroids.
    counts: [L, K] float32, their sizes.
    layers: [B] int32, the layer of a block.
    codes: [B, 1024] int32, the cluster of each sub-vector.
    weight: w, above 0.

  Returns:
    codes, [B, 1024] int32.
  """
  joined = jnp.where(counts > 0, counts / (counts + weight), _CLOSED)
  tables = jnp.concatenate([joined[:, :, None], means], axis=2)
  # What own members pay instead of newcomers; the last one pays nothing.
  remains = counts > weight
  others = jnp.where(remains, counts - weight, 1)
  leaving = jnp.where(remains, (counts + weight) / others, 0)
  extra = jnp.take_along_axis(leaving[layers], codes, axis=1)
  return lax.platform_dependent(
    tuple(columns),
    tables,
    layers,
    codes,
    extra,
    cpu=functools.partial(_transferred, nearest.running_minimum),
    default=functools.partial(_transferred, nearest.reduced_minimum),
  )


def _transferred(
  minimum: nearest.Minimum,
  columns: tuple[jax.Array, ...],
  tables: jax.Array,
  layers: jax.Array,
  codes: jax.Array,
  extra: jax.Array,
) -> jax.Array:
  def cost(
    columns: Sequence[jax.Array], row: Sequence[jax.Array], index: jax.Array
  ) -> jax.Array:
    squares = [
      jnp.square(column - center)
      for column, center in zip(columns[:-2], row[1:], strict=True)
    ]
    own, extra = columns[-2:]
    price = row[0] * sum(squares[1:], squares[0])
    return jnp.where(own == index.astype(own.dtype), price * extra, price)

  return minimum(
    (*columns, codes.astype(jnp.float32), extra), tables, layers, cost
  )

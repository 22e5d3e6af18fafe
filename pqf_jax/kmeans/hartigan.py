"""Hartigan's rule: a sub-vector moves where the total error falls most.

K-means ends where every sub-vector is nearest to its own centroid, which the
sub-vector itself has drawn towards it. The true gain of a move accounts for
both centroids following it (Hartigan, Clustering Algorithms, 1975, chapter 4):
from cluster i with n_i members to j, the total squared error changes by

    n_j / (n_j + 1) |x - c_j|^2  -  n_i / (n_i - 1) |x - c_i|^2

where c are the means. Where clusters are small these factors matter: at 8
sub-vectors a centroid, the rule improves by 1.5 % on a result that k-means
cannot improve any more (docs/kmeans_quality.md).

With w instead of 1 this is a rule between k-means (w = 0) and Hartigan's.

A kernel for GPUs (`pqf_jax.kmeans.backends.hopper_nearest`) finds the cheapest
other cluster as it finds the nearest centroid: n_j / (n_j + w) times
|x|^2 - 2 <x, c_j> + |c_j|^2 is linear in (x, |x|^2).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pqf_jax.kmeans import assignment
from pqf_jax.kmeans.backends import hopper_nearest
from pqf_jax.numerics import bf16_split

# Where empty clusters are taken to be; its square is a float32 number.
_FAR = 1e18


class _Prices(NamedTuple):
  """The factors of squared distances, and the points they are measured from.

  Attributes:
    joining: [L, K], the factor for a newcomer.
    leaving: [L, K], the factor for a member, over that for a newcomer.
    means: [L, K, D].
  """

  joining: jax.Array
  leaving: jax.Array
  means: jax.Array


def assign(
  columns: assignment.Columns,
  means: jax.Array,
  counts: jax.Array,
  layers: jax.Array,
  codes: jax.Array,
  *,
  weight: float = 1.0,
  vectors: jax.Array | None = None,
) -> jax.Array:
  """Assigns each sub-vector to the cluster where it costs least.

  Each is judged as if it moved alone. An empty cluster takes none: to all of
  them it would look equally cheap.

  Args:
    columns: D arrays [B, 1024] float32, from `batching.split_columns`.
    means: [L, K, D] float32, of the clusters, or other centroids.
    counts: [L, K] float32, their sizes.
    layers: [B] int32, the layer of a tile.
    codes: [B, 1024] int32, the present cluster of each sub-vector.
    weight: w, above 0.
    vectors: [B, depth, 1024] bfloat16, from `bf16_split.split_vectors` for
      D + 1 columns, x and |x|^2, which the kernel for GPUs needs; None: without
      the kernel, on any platform.

  Returns:
    codes, [B, 1024] int32.
  """
  prices = _prices(means, counts, weight)
  if vectors is not None:
    return _by_kernel(prices, vectors, columns, means, counts, layers, codes)
  return lax.platform_dependent(
    columns,
    jnp.concatenate([prices.joining[:, :, None], prices.means], axis=2),
    layers,
    codes,
    jnp.take_along_axis(prices.leaving[layers], codes, axis=1),
    cpu=functools.partial(_by_minimum, assignment.running_minimum),
    default=functools.partial(_by_minimum, assignment.reduced_minimum),
  )


def _by_kernel(
  prices: _Prices,
  vectors: jax.Array,
  columns: assignment.Columns,
  means: jax.Array,
  counts: jax.Array,
  layers: jax.Array,
  codes: jax.Array,
) -> jax.Array:
  joining = prices.joining[:, :, None]
  rows = joining * jnp.concatenate(
    [assignment.score_tables(means), jnp.ones_like(joining)], axis=2
  )
  closed = jnp.zeros_like(rows).at[:, :, 0].set(bf16_split.UNREACHABLE)
  rows = jnp.where(counts[:, :, None] > 0, rows, closed)
  cheapest = hopper_nearest.nearest(vectors, rows, layers, codes)
  num_codes = means.shape[1]
  # Where all other clusters are empty, this may be a row that pads the table.
  cheapest = jnp.minimum(cheapest, num_codes - 1)

  def price(codes: jax.Array) -> jax.Array:
    owners = layers[:, None] * num_codes + codes
    squares = [
      jnp.square(column - prices.means[:, :, i].reshape(-1)[owners])
      for i, column in enumerate(columns)
    ]
    return prices.joining.reshape(-1)[owners] * sum(squares[1:], squares[0])

  owners = layers[:, None] * num_codes + codes
  stay = price(codes) * prices.leaving.reshape(-1)[owners]
  return jnp.where(price(cheapest) < stay, cheapest, codes)


def _prices(means: jax.Array, counts: jax.Array, weight: float) -> _Prices:
  some = counts > 0
  # The last member pays nothing.
  remains = counts > weight
  others = jnp.where(remains, counts - weight, 1)
  return _Prices(
    joining=jnp.where(some, counts / (counts + weight), 1),
    leaving=jnp.where(remains, (counts + weight) / others, 0),
    means=jnp.where(some[:, :, None], means, _FAR),
  )


def _by_minimum(
  minimum: assignment.Minimum,
  columns: assignment.Columns,
  tables: jax.Array,
  layers: jax.Array,
  codes: jax.Array,
  leaving: jax.Array,
) -> jax.Array:
  def cost(
    columns: Sequence[jax.Array], row: Sequence[jax.Array], index: jax.Array
  ) -> jax.Array:
    *columns, codes, leaving = columns
    squares = [
      jnp.square(column - center)
      for column, center in zip(columns, row[1:], strict=True)
    ]
    price = row[0] * sum(squares[1:], squares[0])
    return jnp.where(codes == index.astype(codes.dtype), price * leaving, price)

  return minimum(
    (*columns, codes.astype(jnp.float32), leaving), tables, layers, cost
  )

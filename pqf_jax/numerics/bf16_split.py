"""Scores of sub-vectors against centroids as one bfloat16 matrix product.

Matrix units multiply bfloat16 and add float32. A float32 number is the sum of
three bfloat16 ones, x = x0 + x1 + x2, so

    x c = x0 c0 + x0 c1 + x1 c0 + x1 c1 + x0 c2 + x2 c0 + rest

with a rest below 2^-23 |x c|, and every product on the right exact. Side by
side along the contraction these six are a *single* pass of the unit, 6 D + 3
deep with the three pieces of |c|^2: what a depth of 64 or 128 has room for at
D = 9 and 18, where float32 "by six passes" would run each of them 9 or 18 deep.
The sums are as good as those of float32 arithmetic (tests/ops/test_pieces.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

PAIRS = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0))
"""Which piece of a sub-vector meets which piece of a centroid."""

UNREACHABLE = 1e38
"""A score that no sub-vector prefers; infinity has no pieces."""

# The depth of a product is a multiple of it: what one instruction of a GPU and
# a tile of a TPU have room for. Beyond twice that, of four times.
_DEPTH = 32


def depth(length: int) -> int:
  """The contraction of a product for sub-vectors of length D, padded."""
  needed = len(PAIRS) * length + 3
  unit = _DEPTH if needed <= _DEPTH else 2 * _DEPTH
  return -(-needed // unit) * unit


def of_vectors(columns: Sequence[jax.Array]) -> jax.Array:
  """D columns [B, 1024] float32 -> [B, depth, 1024] bfloat16."""
  split = [cut(column) for column in columns]
  rows = [pieces[i] for i, _ in PAIRS for pieces in split]
  rows += [jnp.ones_like(columns[0])] * 3
  stacked = jnp.stack(rows, axis=1)
  padding = depth(len(columns)) - stacked.shape[1]
  return jnp.pad(stacked, ((0, 0), (0, padding), (0, 0))).astype(jnp.bfloat16)


def of_tables(tables: jax.Array, *, unit: int) -> jax.Array:
  """Tables [L, K, D + 1] float32 -> [L, depth, K'] bfloat16.

  Row (r, f) of a table scores a sub-vector x by r + <x, f>. K' is the multiple
  of `unit` from K on; rows beyond K are out of reach.
  """
  num_codes, width = tables.shape[1:]
  padding = ((0, 0), (0, -num_codes % unit), (0, 0))
  tables = jnp.pad(tables, padding).at[:, num_codes:, 0].set(UNREACHABLE)
  norms = cut(tables[:, :, :1])
  factors = cut(tables[:, :, 1:])
  rows = jnp.concatenate([*(factors[j] for _, j in PAIRS), *norms], axis=2)
  padding = ((0, 0), (0, 0), (0, depth(width - 1) - rows.shape[2]))
  return jnp.moveaxis(jnp.pad(rows, padding), 2, 1).astype(jnp.bfloat16)


def cut(values: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Three float32 arrays of bfloat16 numbers whose sum is `values`."""
  first = lax.reduce_precision(values, 8, 7)
  rest = values - first
  second = lax.reduce_precision(rest, 8, 7)
  return first, second, rest - second

"""The bf16 split: float32 scores as a single bfloat16 matrix product.

Matrix units multiply bfloat16 and add float32. A float32 number is the sum of
three bfloat16 ones, x = x0 + x1 + x2, so

    x c = x0 c0 + x0 c1 + x1 c0 + x1 c1 + x0 c2 + x2 c0 + rest

with a rest below 2^-23 |x c|, and every product on the right exact. Side by
side along the contraction these six are a *single* pass of the unit, 6 D + 3
deep with the three parts of |c|^2. A depth of 64 or 128 has room for that at
D = 9 and 18, where float32 "by six passes" would run each of them 9 or 18 deep.
The sums are as good as those of float32 arithmetic
(tests/numerics/test_bf16_split.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

PAIRS = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0))
"""The products: (part of the sub-vector, part of the centroid)."""

UNREACHABLE = 1e38
"""A score that no sub-vector prefers; infinity cannot be split."""

# The depth of a product is a multiple of it, because one instruction of a GPU
# and a tile of a TPU have room for so many. A depth beyond twice that is a
# multiple of four times.
_DEPTH = 32


def depth(length: int) -> int:
  """Returns the depth of a product for sub-vectors of length D, padded."""
  needed = len(PAIRS) * length + 3
  unit = _DEPTH if needed <= _DEPTH else 2 * _DEPTH
  return -(-needed // unit) * unit


def split_vectors(columns: Sequence[jax.Array]) -> jax.Array:
  """Splits sub-vectors: D columns [B, 1024] -> [B, depth, 1024] bfloat16."""
  parts = [split(column) for column in columns]
  rows = [column_parts[i] for i, _ in PAIRS for column_parts in parts]
  rows += [jnp.ones_like(columns[0])] * 3
  stacked = jnp.stack(rows, axis=1)
  padding = depth(len(columns)) - stacked.shape[1]
  return jnp.pad(stacked, ((0, 0), (0, padding), (0, 0))).astype(jnp.bfloat16)


def split_tables(tables: jax.Array, *, unit: int) -> jax.Array:
  """Splits score tables: [L, K, D + 1] -> [L, depth, K'] bfloat16.

  Row (r, f) of a table scores a sub-vector x by r + <x, f>. K' is K, filled up
  to a multiple of `unit` with rows that are `UNREACHABLE`.
  """
  num_codes, width = tables.shape[1:]
  padding = ((0, 0), (0, -num_codes % unit), (0, 0))
  tables = jnp.pad(tables, padding).at[:, num_codes:, 0].set(UNREACHABLE)
  norms = split(tables[:, :, :1])
  factors = split(tables[:, :, 1:])
  rows = jnp.concatenate([*(factors[j] for _, j in PAIRS), *norms], axis=2)
  padding = ((0, 0), (0, 0), (0, depth(width - 1) - rows.shape[2]))
  return jnp.moveaxis(jnp.pad(rows, padding), 2, 1).astype(jnp.bfloat16)


def split(values: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Splits float32 into three float32 arrays of bfloat16 numbers."""
  first = lax.reduce_precision(values, 8, 7)
  rest = values - first
  second = lax.reduce_precision(rest, 8, 7)
  return first, second, rest - second

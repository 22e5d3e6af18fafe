"""Rows of a table by their number, as a matrix product of 0 and 1, for TPUs.

A gather on a TPU writes rows of D numbers padded to 128, at D = 4 that is 32
times the kernel, and reads them again: by the compiler's count 10 times the
traffic.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pqf_jax.numerics import bf16_split


def columns(table: jax.Array, rows: jax.Array) -> jax.Array:
  """Returns `table[rows]`, [..., D], with D in front: [D, ...], bit for bit.

  A NaN or infinity makes its whole column NaN, and numbers below 1e-30 may lose
  their last bits, which would be subnormal.

  Args:
    table: [K, D] float32 or less.
    rows: [...] integer, 0 to K - 1.
  """
  num_rows, length = table.shape
  parts = bf16_split.split(table.astype(jnp.float32))
  stacked = jnp.concatenate(parts, axis=1).astype(jnp.bfloat16)
  numbers = jnp.arange(num_rows, dtype=jnp.int32)
  chosen = rows.reshape(-1)[None].astype(jnp.int32) == numbers[:, None]
  gathered = lax.dot_general(
    stacked,
    chosen.astype(jnp.bfloat16),
    (((0,), (0,)), ((), ())),
    preferred_element_type=jnp.float32,
  )
  # Exact in this order: each sum has no more bits than the table's numbers.
  first, second, third = gathered.reshape(len(parts), length, -1)
  whole = ((first + second) + third).astype(table.dtype)
  return whole.reshape(length, *rows.shape)

"""Rows of a table by their number, in the form of the platform."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pqf_jax.ops import pieces


def look_up(table: jax.Array, rows: jax.Array) -> jax.Array:
  """Returns the rows [..., D] of a table [K, D], bit for bit.

  TPUs multiply the table with 0 and 1: a gather there writes rows of D numbers
  padded to 128, at D = 4 that is 32 times the kernel, and reads them again.
  There a NaN or infinity makes its whole column NaN, and numbers below 1e-30
  may lose their last bits, which would be subnormal.

  Args:
    table: [K, D] float.
    rows: [...] integer, 0 to K - 1.
  """
  # 'clip' costs nothing and spares XLA the out-of-bounds branch of 'fill'.
  take = functools.partial(jnp.take, axis=0, mode="clip")
  if table.dtype == jnp.float64:  # three pieces do not hold it
    return take(table, rows)
  return lax.platform_dependent(table, rows, tpu=product, default=take)


def product(table: jax.Array, rows: jax.Array) -> jax.Array:
  """`look_up` as a matrix product; numbers lie along lanes, not D of them."""
  num_rows, length = table.shape
  split = pieces.cut(table.astype(jnp.float32))
  stacked = jnp.concatenate(split, axis=1).astype(jnp.bfloat16)
  numbers = jnp.arange(num_rows, dtype=jnp.int32)
  chosen = rows.reshape(-1)[None].astype(jnp.int32) == numbers[:, None]
  found = lax.dot_general(
    stacked,
    chosen.astype(jnp.bfloat16),
    (((0,), (0,)), ((), ())),
    preferred_element_type=jnp.float32,
  )
  # Exact in this order: each sum has no more bits than the table's numbers.
  first, second, third = found.reshape(len(split), length, -1)
  whole = ((first + second) + third).astype(table.dtype)
  return jnp.moveaxis(whole.reshape(length, *rows.shape), 0, -1)

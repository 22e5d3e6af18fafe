"""Nearest centroid of every sub-vector, exact in float32, without N x K memory.

N sub-vectors of length D, K centroids. The score of a pair is
`|c|^2 - 2 <x, c>`, the squared distance less `|x|^2`. All forms compute it with
element-wise float32 arithmetic: a matrix product would be TF32 on an H100 and
bfloat16 on a TPU unless told otherwise, and it would store all N x K scores.

Sub-vectors travel as D columns of length N ("columns"), because N is the long
axis that vector lanes, threads and cores should run along, and because
XLA:CPU copies every row that it has to slice out of a [D, N] array.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pqf_jax import errors


def assign(vectors: jax.Array, codebook: jax.Array) -> jax.Array:
  """Returns the index of the nearest centroid of every sub-vector.

  Equal distances go to the lowest index on a CPU, to either elsewhere. Both
  arguments are centred first, so a common offset costs no accuracy.

  Args:
    vectors: [N, D], any float type.
    codebook: [K, D], any float type.

  Returns:
    codes, [N] int32.

  Raises:
    InputError: the arguments are not two matrices with the same number of
      columns, or the codebook is empty.
  """
  shapes = np.shape(vectors), np.shape(codebook)
  if [len(shape) for shape in shapes] != [2, 2] or shapes[0][1] != shapes[1][1]:
    raise errors.InputError(
      f"assign: vectors {list(shapes[0])} and codebook {list(shapes[1])} must"
      " be [N, D] and [K, D] with the same D; reshape one of them."
    )
  if shapes[1][0] < 1:
    raise errors.InputError(
      f"assign: codebook {list(shapes[1])} has no centroid; give at least 1."
    )
  return _assign(jnp.asarray(vectors), jnp.asarray(codebook))


@jax.jit
def _assign(vectors: jax.Array, codebook: jax.Array) -> jax.Array:
  codebook = codebook.astype(jnp.float32)
  offset = codebook.mean(axis=0, keepdims=True)
  columns = split_columns(vectors.astype(jnp.float32) - offset)
  return nearest_centroid(columns, codebook - offset)[0]


def split_columns(vectors: jax.Array) -> tuple[jax.Array, ...]:
  """Returns the D columns, each [N], of an [N, D] matrix."""
  return tuple(vectors[:, i] for i in range(vectors.shape[1]))


def nearest_centroid(
  columns: Sequence[jax.Array], codebook: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the nearest centroid of every sub-vector and its score.

  Args:
    columns: D arrays [N] float32, from `split_columns`.
    codebook: [K, D] float32.

  Returns:
    codes, [N] int32, and scores, [N] float32, `min_c |c|^2 - 2 <x, c>`; add
    `|x|^2` to get squared distances.
  """
  norms = jnp.square(codebook).sum(axis=1, keepdims=True)
  table = jnp.concatenate([norms, -2 * codebook], axis=1)
  return lax.platform_dependent(
    tuple(columns), table, cpu=_running_minimum, default=_reduced_minimum
  )


def _score(columns: Sequence[jax.Array], row: Sequence[jax.Array]) -> jax.Array:
  """Returns `row[0] + sum_i columns[i] * row[i + 1]`."""
  score = row[0]
  for column, factor in zip(columns, row[1:], strict=True):
    score = score + column * factor
  return score


def _running_minimum(
  columns: Sequence[jax.Array], table: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Passes over all sub-vectors, 8 or 16 centroids at a time, for XLA:CPU.

  The best score and its index ride in one complex array (index exact up to
  2^24): XLA:CPU fuses a pass into one vectorized kernel split over the cores
  only if the kernel has a single result. With two results it computes all
  scores twice and copies the columns: 38 ms instead of 11 at N = 262144,
  D = 9, K = 256 on two cores. Temporary memory: 8 bytes a sub-vector.
  """
  rows, width = table.shape
  # A pass reads D + 2 and writes 2 numbers a sub-vector however many centroids
  # it serves: more is better until the registers spill. Measured, D = 1..72.
  num_scored = 16 if len(columns) <= 12 else 8
  padding = jnp.zeros((-rows % num_scored, width), table.dtype)
  padding = padding.at[:, 0].set(jnp.inf)
  table = jnp.concatenate([table, padding]).reshape(-1, num_scored, width)
  first = jnp.arange(table.shape[0], dtype=table.dtype) * num_scored

  def one_pass(
    best: jax.Array, block: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, None]:
    block_table, block_first = block
    value, index = best.real, best.imag
    for i in range(num_scored):
      score = _score(columns, tuple(block_table[i]))
      closer = score < value
      value = jnp.where(closer, score, value)
      index = jnp.where(closer, block_first + i, index)
    return lax.complex(value, index), None

  start = lax.complex(
    jnp.full_like(columns[0], jnp.inf), jnp.zeros_like(columns[0])
  )
  best, _ = lax.scan(one_pass, start, (table, first))
  return best.imag.astype(jnp.int32), best.real


def _reduced_minimum(
  columns: Sequence[jax.Array], table: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Reduces over the centroid axis of [K, N] scores that are never stored.

  XLA:GPU fuses the scores into the column reduction. The three-operation
  reducer replaces `argmin`, whose rules for NaN and ties cost six more.
  """
  scores = _score(
    [column[None, :] for column in columns],
    [table[:, i, None] for i in range(table.shape[1])],
  )
  indices = lax.broadcasted_iota(jnp.int32, scores.shape, 0)

  def smaller(
    left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, jax.Array]:
    closer = right[0] < left[0]
    return (
      jnp.where(closer, right[0], left[0]),
      jnp.where(closer, right[1], left[1]),
    )

  start = jnp.float32(jnp.inf), jnp.int32(0)
  values, codes = lax.reduce((scores, indices), start, smaller, (0,))
  return codes, values

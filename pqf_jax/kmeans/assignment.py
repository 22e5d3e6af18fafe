"""Nearest centroid of every sub-vector, exact in float32, without N x K memory.

N sub-vectors of length D, K centroids. The score of a pair is
`|c|^2 - 2 <x, c>`, the squared distance less `|x|^2`, to the accuracy of
float32 on every platform: an ordinary matrix product would by default be TF32
on an H100 and bfloat16 on a TPU, and it would store all N x K scores.

The platform chooses how the smallest score is found: a kernel for NVIDIA Hopper
and later (`pqf_jax.kmeans.backends.hopper_nearest`) if a codebook fits into its
shared memory, one fused reduction for other accelerators, passes with a running
minimum for CPUs. TPUs have a kernel for the loop of k-means only
(`pqf_jax.kmeans.backends.tpu`).

There is no faster option of less precision, because it would save little: with
3 of the 6 products of the bf16 split, 16 bits of every number, an iteration
takes 42 us instead of 47 at N = 262144, D = 9 and 37 instead of 44 at
N = 131072, D = 18 (K = 256, H100); with 1 of them, bfloat16, 43 us, for 0.4 %
more error after 1000 steps. The choice of the smallest score and the sums
remain. To measure:
`python -m benchmarks.kmeans --methods "pqf_jax, 3 of 6 products"`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pqf_jax import errors, nvidia
from pqf_jax.kmeans import batching
from pqf_jax.kmeans.backends import hopper_nearest
from pqf_jax.numerics import bf16_split, exact

Columns = tuple[jax.Array, ...]
"""Arrays [B, 1024]: one for each of the D entries of a sub-vector."""

Score = Callable[
  [Sequence[jax.Array], Sequence[jax.Array], jax.Array], jax.Array
]
"""(columns, row of a table, its index) -> scores, of the columns' shape."""

Minimum = Callable[[Columns, jax.Array, jax.Array, Score], jax.Array]
"""`running_minimum` or `reduced_minimum`."""


def assign(vectors: jax.Array, codebook: jax.Array) -> jax.Array:
  """Returns the index of the nearest centroid of every sub-vector.

  Equal distances go to the lowest index on CPUs and Hopper GPUs, to either
  elsewhere. Both arguments are centred first, so neither a common offset nor a
  few centroids far from all others cost accuracy.

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
  # The median; the mean would go with a centroid of 1e5.
  offset = jnp.sort(codebook, axis=0)[None, codebook.shape[0] // 2]
  batch = batching.make_batch([vectors.astype(jnp.float32) - offset])
  codes = nearest_centroid(
    batching.split_columns(batch.tiles),
    (codebook - offset)[None],
    batch.layout.layers,
  )
  return codes.reshape(-1)[: vectors.shape[0]]


def nearest_centroid(
  columns: Columns, codebooks: jax.Array, layers: jax.Array
) -> jax.Array:
  """Returns the nearest centroid of every sub-vector of a batch.

  Args:
    columns: D arrays [B, 1024] float32, from `batching.split_columns`.
    codebooks: [L, K, D] float32.
    layers: [B] int32, the codebook that a tile is compared with.

  Returns:
    codes, [B, 1024] int32.
  """
  functions: dict[str, Callable[..., jax.Array]] = {
    "cpu": running_minimum,
    "default": reduced_minimum,
  }
  length, num_codes = codebooks.shape[2], codebooks.shape[1]
  if nvidia.is_available() and hopper_nearest.fits(length, num_codes):
    functions["cuda"] = lambda columns, tables, layers: hopper_nearest.nearest(
      bf16_split.split_vectors(columns), tables, layers
    )
  return lax.platform_dependent(
    columns, score_tables(codebooks), layers, **functions
  )


def score_tables(codebooks: jax.Array) -> jax.Array:
  """Returns |c|^2 and the factors -2 c: [L, K, D] -> [L, K, D + 1]."""
  norms = exact.dot(codebooks, codebooks)[:, :, None]
  return jnp.concatenate([norms, -2 * codebooks], axis=2)


def linear_score(
  columns: Sequence[jax.Array], row: Sequence[jax.Array], index: jax.Array
) -> jax.Array:
  """Returns `row[0] + sum_i columns[i] * row[i + 1]`."""
  del index
  score = row[0]
  for column, factor in zip(columns, row[1:], strict=True):
    score = score + column * factor
  return score


def _tables_of_tiles(tables: jax.Array, layers: jax.Array) -> jax.Array:
  """Returns each tile's table, [B, K, D + 1], or the only one if L = 1."""
  return tables if tables.shape[0] == 1 else tables[layers]


def running_minimum(
  columns: Columns,
  tables: jax.Array,
  layers: jax.Array,
  score: Score = linear_score,
) -> jax.Array:
  """Finds smallest scores in passes over all sub-vectors, for XLA:CPU.

  A pass compares 8 or 16 centroids. The best score and its index ride in one
  complex array (index exact up to 2^24): XLA:CPU fuses a pass into one
  vectorized kernel split over the cores only if the kernel has a single result.
  With two results it computes all scores twice and copies the columns: 38 ms
  instead of 11 at N = 262144, D = 9, K = 256 on two cores. Temporary memory: 8
  bytes a sub-vector.
  """
  num_layers, rows, width = tables.shape
  # A pass reads D + 2 and writes 2 numbers a sub-vector however many centroids
  # it serves: more is better until the registers spill. Measured, D = 1..72.
  num_scored = 16 if len(columns) <= 12 else 8
  padding = jnp.zeros((num_layers, -rows % num_scored, width), tables.dtype)
  padding = padding.at[:, :, 0].set(jnp.inf)
  tables = jnp.concatenate([tables, padding], axis=1)
  tables = tables.reshape(num_layers, -1, num_scored, width)
  first = jnp.arange(tables.shape[1], dtype=tables.dtype) * num_scored
  passes = jnp.moveaxis(_tables_of_tiles(tables, layers), 1, 0)

  def one_pass(
    best: jax.Array, scored: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, None]:
    table, first_index = scored
    value, index = best.real, best.imag
    for i in range(num_scored):
      row = [table[:, i, j, None] for j in range(width)]
      new = score(columns, row, first_index + i)
      closer = new < value
      value = jnp.where(closer, new, value)
      index = jnp.where(closer, first_index + i, index)
    return lax.complex(value, index), None

  start = lax.complex(
    jnp.full_like(columns[0], jnp.inf), jnp.zeros_like(columns[0])
  )
  best, _ = lax.scan(one_pass, start, (passes, first))
  return best.imag.astype(jnp.int32)


def reduced_minimum(
  columns: Columns,
  tables: jax.Array,
  layers: jax.Array,
  score: Score = linear_score,
) -> jax.Array:
  """Finds smallest scores by reducing [B, K, 1024] of them, never stored.

  XLA:GPU fuses the scores, and the choice of the codebook, into the column
  reduction. The three-operation reducer replaces `argmin`, whose rules for NaN
  and ties cost six more.
  """
  tables = _tables_of_tiles(tables, layers)
  indices = jnp.arange(tables.shape[1], dtype=jnp.int32)[None, :, None]
  scores = score(
    [column[:, None, :] for column in columns],
    [tables[:, :, i, None] for i in range(tables.shape[2])],
    indices,
  )
  indices = jnp.broadcast_to(indices, scores.shape)

  def smaller(
    left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, jax.Array]:
    closer = right[0] < left[0]
    return (
      jnp.where(closer, right[0], left[0]),
      jnp.where(closer, right[1], left[1]),
    )

  start = jnp.float32(jnp.inf), jnp.int32(0)
  return lax.reduce((scores, indices), start, smaller, (1,))[1]

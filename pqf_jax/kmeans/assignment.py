"""Nearest centroid of every sub-vector, exact in float32, without N x K memory.

N sub-vectors of length D, K centroids. The score of a pair is
`|c|^2 - 2 <x, c>`, the squared distance less `|x|^2`, to the accuracy of
float32 in every form: an ordinary matrix product would be TF32 on an H100 and
bfloat16 on a TPU unless told otherwise, and it would store all N x K scores.

Sub-vectors travel as D columns [B, 1024] ("columns"): B blocks of 1024
sub-vectors each. Columns, because the long axis is the one that vector lanes,
threads and cores should run along. Blocks, because a block may have a codebook
of its own, so that layers of any size share one call.

Forms, chosen by platform: a kernel for NVIDIA Hopper and later
(`pqf_jax.kmeans.backends.hopper_nearest`) if a codebook fits into its shared
memory, one fused reduction for other accelerators, passes with a running
minimum for CPUs. TPUs have a kernel for the loop of k-means
(`pqf_jax.kmeans.backends.selection`).

There is no faster option of less precision, because it would save little: with
3 of the 6 products of `pieces`, 16 bits of every number, an iteration takes 42
us instead of 47 at N = 262144, D = 9 and 37 instead of 44 at N = 131072, D = 18
(K = 256, H100); with 1 of them, bfloat16, 43 us, for 0.4 % more error after
1000 steps. The choice of the smallest score and the sums remain. To measure:
`python -m benchmarks.kmeans --methods "pqf_jax, 3 of 6 products"`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pqf_jax import errors
from pqf_jax.kmeans.backends import hopper_nearest
from pqf_jax.numerics import bf16_split, exact

BLOCK = 1024
"""Sub-vectors of a block."""


Score = Callable[
  [Sequence[jax.Array], Sequence[jax.Array], jax.Array], jax.Array
]
"""(columns, row of a table, its index) -> scores, of the columns' shape."""

Minimum = Callable[..., jax.Array]
"""`running_minimum` or `reduced_minimum`."""


def assign(vectors: jax.Array, codebook: jax.Array) -> jax.Array:
  """Returns the index of the nearest centroid of every sub-vector.

  Equal distances go to the lowest index on CPUs and Hopper GPUs, to either
  elsewhere. Both arguments are centred first, so a common offset costs no
  accuracy.

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
  blocks = to_blocks(vectors.astype(jnp.float32) - offset)
  codes = nearest_centroid(
    split_columns(blocks),
    (codebook - offset)[None],
    jnp.zeros(blocks.shape[0], jnp.int32),
  )
  return codes.reshape(-1)[: vectors.shape[0]]


def to_blocks(vectors: jax.Array) -> jax.Array:
  """[N, D] -> [B, 1024, D], padded with zeros."""
  padding = -vectors.shape[0] % BLOCK
  padded = jnp.pad(vectors, ((0, padding), (0, 0)))
  return padded.reshape(-1, BLOCK, vectors.shape[1])


def split_columns(blocks: jax.Array) -> tuple[jax.Array, ...]:
  """Returns the D columns, each [B, 1024], of [B, 1024, D] sub-vectors."""
  return tuple(blocks[:, :, i] for i in range(blocks.shape[2]))


def nearest_centroid(
  columns: Sequence[jax.Array], codebooks: jax.Array, layers: jax.Array
) -> jax.Array:
  """Returns the nearest centroid of every sub-vector.

  Args:
    columns: D arrays [B, 1024] float32, from `split_columns`.
    codebooks: [L, K, D] float32.
    layers: [B] int32, which codebook a block is compared with.

  Returns:
    codes, [B, 1024] int32.
  """
  arguments = tuple(columns), tables(codebooks), layers
  forms = {"cpu": running_minimum, "default": reduced_minimum}
  if hopper_nearest.is_available() and hopper_nearest.fits(
    *codebooks.shape[:0:-1]
  ):
    forms["cuda"] = _kernel_of_columns
  return lax.platform_dependent(*arguments, **forms)


def tables(codebooks: jax.Array) -> jax.Array:
  """[L, K, D] -> [L, K, D + 1]: |c|^2, and the factors of a sub-vector."""
  norms = exact.dot(codebooks, codebooks)[:, :, None]
  return jnp.concatenate([norms, -2 * codebooks], axis=2)


@jax.custom_batching.sequential_vmap
def kernel(
  vectors: jax.Array, tables: jax.Array, layers: jax.Array
) -> jax.Array:
  """`nearest_gpu.nearest`, which under `vmap` runs once after the other."""
  return hopper_nearest.nearest(vectors, tables, layers)


@jax.custom_batching.sequential_vmap
def kernel_but_own(
  vectors: jax.Array, tables: jax.Array, layers: jax.Array, own: jax.Array
) -> jax.Array:
  """`kernel`, but every sub-vector passes over the row `own`."""
  return hopper_nearest.nearest(vectors, tables, layers, own)


def _kernel_of_columns(
  columns: tuple[jax.Array, ...], tables: jax.Array, layers: jax.Array
) -> jax.Array:
  return kernel(bf16_split.of_vectors(columns), tables, layers)


def linear_score(
  columns: Sequence[jax.Array], row: Sequence[jax.Array], index: jax.Array
) -> jax.Array:
  """Returns `row[0] + sum_i columns[i] * row[i + 1]`."""
  del index
  score = row[0]
  for column, factor in zip(columns, row[1:], strict=True):
    score = score + column * factor
  return score


def _of_blocks(tables: jax.Array, layers: jax.Array) -> jax.Array:
  """[L, K, D + 1] -> [B, K, D + 1], or [1, K, D + 1] if L = 1."""
  return tables if tables.shape[0] == 1 else tables[layers]


def running_minimum(
  columns: tuple[jax.Array, ...],
  tables: jax.Array,
  layers: jax.Array,
  score: Score = linear_score,
) -> jax.Array:
  """Passes over all sub-vectors, 8 or 16 centroids at a time, for XLA:CPU.

  The best score and its index ride in one complex array (index exact up to
  2^24): XLA:CPU fuses a pass into one vectorized kernel split over the cores
  only if the kernel has a single result. With two results it computes all
  scores twice and copies the columns: 38 ms instead of 11 at N = 262144,
  D = 9, K = 256 on two cores. Temporary memory: 8 bytes a sub-vector.
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
  passes = jnp.moveaxis(_of_blocks(tables, layers), 1, 0)

  def one_pass(
    best: jax.Array, block: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, None]:
    block_table, block_first = block
    value, index = best.real, best.imag
    for i in range(num_scored):
      row = [block_table[:, i, j, None] for j in range(width)]
      new = score(columns, row, block_first + i)
      closer = new < value
      value = jnp.where(closer, new, value)
      index = jnp.where(closer, block_first + i, index)
    return lax.complex(value, index), None

  start = lax.complex(
    jnp.full_like(columns[0], jnp.inf), jnp.zeros_like(columns[0])
  )
  best, _ = lax.scan(one_pass, start, (passes, first))
  return best.imag.astype(jnp.int32)


def reduced_minimum(
  columns: tuple[jax.Array, ...],
  tables: jax.Array,
  layers: jax.Array,
  score: Score = linear_score,
) -> jax.Array:
  """Reduces over the centroid axis of [B, K, 1024] scores, never stored.

  XLA:GPU fuses the scores, and the choice of the codebook, into the column
  reduction. The three-operation reducer replaces `argmin`, whose rules for NaN
  and ties cost six more.
  """
  tables = _of_blocks(tables, layers)
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

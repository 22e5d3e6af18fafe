"""Nearest centroids and sums of clusters as one Pallas kernel for TPUs.

Both are matrix products of bfloat16 numbers that are exact: scores are products
of pieces (`pqf_jax.ops.pieces`), sums are products of the words' digits with
which-centroid-is-nearest, 0 or 1. Neither scores nor that matrix leave the
chip's vector memory, and narrow arrays of integers, which would be padded to
128 lanes, do not occur: sub-vectors lie along the lanes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from pqf_jax.ops import pieces

MOST_ROWS = 2**23
"""So many digits of 8 bits can be added to an int32."""

# Centroids of one product.
_CHUNK = 256


def assign_and_add(
  vectors: jax.Array,
  digits: jax.Array,
  tables: jax.Array,
  layers: jax.Array,
  *,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Returns the nearest centroid of every sub-vector, and sums of clusters.

  Args:
    vectors: [B, depth, 1024] bfloat16, from `pieces.of_vectors`.
    digits: [B, W, 1024] bfloat16, whole numbers up to 256 in absolute value.
    tables: [L, K, D + 1] float32; row (r, f) scores x by r + <x, f>, and the
      lowest index wins a tie.
    layers: [B] int32, which table a block is scored with; ascending.
    interpret: whether to run it with Pallas's interpreter, for tests on a CPU.

  Returns:
    codes [B, 1024] int32, and sums [L, W, K] int32 of the digits.
  """
  num_blocks, depth, block = vectors.shape
  num_digits = digits.shape[1]
  num_layers, num_codes, _ = tables.shape
  tables = pieces.of_tables(tables, unit=_CHUNK)
  num_held = tables.shape[2]

  def of_block(index: jax.Array, _: jax.Ref) -> tuple[jax.Array, int, int]:
    return index, 0, 0

  def of_layer(index: jax.Array, layers: jax.Ref) -> tuple[jax.Array, int, int]:
    return layers[index], 0, 0

  codes, sums = pl.pallas_call(
    _body,
    out_shape=(
      jax.ShapeDtypeStruct((num_blocks, 1, block), jnp.int32),
      jax.ShapeDtypeStruct((num_layers, num_digits, num_held), jnp.int32),
    ),
    grid_spec=tpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(num_blocks,),
      in_specs=[
        pl.BlockSpec((1, depth, block), of_block),
        pl.BlockSpec((1, num_digits, block), of_block),
        pl.BlockSpec((1, depth, num_held), of_layer),
      ],
      out_specs=[
        pl.BlockSpec((1, 1, block), of_block),
        pl.BlockSpec((1, num_digits, num_held), of_layer),
      ],
    ),
    cost_estimate=_cost(vectors, digits, tables, num_layers),
    interpret=interpret,
  )(layers, vectors, digits, tables)
  return codes[:, 0], sums[:, :, :num_codes]


def _cost(
  vectors: jax.Array, digits: jax.Array, tables: jax.Array, num_layers: int
) -> pl.CostEstimate:
  """What the kernel does and moves, which the compiler cannot see."""
  num_blocks, depth, block = vectors.shape
  num_digits, num_held = digits.shape[1], tables.shape[2]
  count = num_blocks * block
  return pl.CostEstimate(
    flops=2 * count * num_held * (depth + num_digits),
    transcendentals=0,
    bytes_accessed=vectors.nbytes
    + digits.nbytes
    + tables.nbytes
    + 4 * (count + num_layers * num_digits * num_held),
  )


def _body(
  layers: jax.Ref,
  vectors: jax.Ref,
  digits: jax.Ref,
  tables: jax.Ref,
  codes: jax.Ref,
  sums: jax.Ref,
) -> None:
  """One block. The sums stay in vector memory until the layer changes."""
  index = pl.program_id(0)
  last = layers[jnp.maximum(index - 1, 0)]

  @pl.when((index == 0) | (layers[index] != last))
  def _() -> None:
    sums[...] = jnp.zeros_like(sums)

  block = vectors.shape[2]
  place = lax.broadcasted_iota(jnp.int32, (_CHUNK, block), 0)
  best = jnp.full((1, block), jnp.inf, jnp.float32)
  nearest = jnp.zeros((1, block), jnp.int32)
  starts = range(0, tables.shape[2], _CHUNK)
  for start in starts:
    score = _product(
      tables[0, :, start : start + _CHUNK], vectors[0], contracted=0
    )
    least = score.min(axis=0, keepdims=True)
    first = jnp.where(score == least, place, _CHUNK).min(axis=0, keepdims=True)
    closer = least < best
    best = jnp.where(closer, least, best)
    nearest = jnp.where(closer, first + start, nearest)
  codes[0] = nearest
  for start in starts:
    chosen = (place + start == nearest).astype(jnp.bfloat16)
    added = _product(digits[0], chosen, contracted=1)
    held = sums[0, :, start : start + _CHUNK]
    sums[0, :, start : start + _CHUNK] = held + added.astype(jnp.int32)


def _product(
  left: jax.Array, right: jax.Array, *, contracted: int
) -> jax.Array:
  dimensions = (((contracted,), (contracted,)), ((), ()))
  return lax.dot_general(
    left, right, dimensions, preferred_element_type=jnp.float32
  )

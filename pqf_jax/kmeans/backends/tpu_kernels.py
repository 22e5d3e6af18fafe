"""Nearest centroids, and sums of clusters, as Pallas kernels for TPUs.

Both are matrix products of bfloat16 numbers that are exact: scores are products
of pieces (`pqf_jax.numerics.bf16_split`), sums are products of the words'
digits with which-centroid-is-chosen, 0 or 1. Neither scores nor that matrix
leave the chip's vector memory, and narrow arrays of integers, which would be
padded to 128 lanes, do not occur: sub-vectors lie along the lanes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from pqf_jax.numerics import bf16_split

MOST_ROWS = 2**23
"""So many digits of 8 bits can be added to an int32."""

# Centroids of one product.
_CHUNK = 256


def nearest(
  vectors: jax.Array,
  tables: jax.Array,
  layers: jax.Array,
  *,
  interpret: bool = False,
) -> jax.Array:
  """Returns the nearest centroid of every sub-vector, [B, 1024] int32.

  Args:
    vectors: [B, depth, 1024] bfloat16, from `pieces.of_vectors`.
    tables: [L, K, D + 1] float32; row (r, f) scores x by r + <x, f>, and the
      lowest index wins a tie.
    layers: [B] int32, which table a block is scored with; ascending.
    interpret: whether to run it with Pallas's interpreter, for tests on a CPU.
  """
  num_blocks, depth, block = vectors.shape
  tables = bf16_split.of_tables(tables, unit=_CHUNK)
  num_held = tables.shape[2]
  codes = pl.pallas_call(
    _nearest_body,
    out_shape=jax.ShapeDtypeStruct((num_blocks, 1, block), jnp.int32),
    grid_spec=tpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(num_blocks,),
      in_specs=[
        pl.BlockSpec((1, depth, block), _of_block),
        pl.BlockSpec((1, depth, num_held), _of_layer),
      ],
      out_specs=pl.BlockSpec((1, 1, block), _of_block),
    ),
    cost_estimate=_cost(vectors, num_held, tables.nbytes),
    interpret=interpret,
  )(layers, vectors, tables)
  return codes[:, 0]


def sums(
  digits: jax.Array,
  codes: jax.Array,
  layers: jax.Array,
  num_layers: int,
  num_codes: int,
  *,
  interpret: bool = False,
) -> jax.Array:
  """Returns the sums of the digits over each cluster, [L, W, K] int32.

  Args:
    digits: [B, W, 1024] bfloat16, whole numbers up to 256 in absolute value.
    codes: [B, 1024] int32.
    layers: [B] int32, the layer of a block; ascending.
    num_layers: L; each has a block.
    num_codes: K.
    interpret: whether to run it with Pallas's interpreter, for tests on a CPU.
  """
  num_blocks, num_digits, block = digits.shape
  num_held = pl.cdiv(num_codes, _CHUNK) * _CHUNK
  added = pl.pallas_call(
    _sums_body,
    out_shape=jax.ShapeDtypeStruct(
      (num_layers, num_digits, num_held), jnp.int32
    ),
    grid_spec=tpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(num_blocks,),
      in_specs=[
        pl.BlockSpec((1, num_digits, block), _of_block),
        pl.BlockSpec((1, 1, block), _of_block),
      ],
      out_specs=pl.BlockSpec((1, num_digits, num_held), _of_layer),
    ),
    cost_estimate=_cost(
      digits, num_held, 4 * num_layers * num_digits * num_held
    ),
    interpret=interpret,
  )(layers, digits, codes[:, None])
  return added[:, :, :num_codes]


def _of_block(index: jax.Array, _: jax.Ref) -> tuple[jax.Array, int, int]:
  return index, 0, 0


def _of_layer(index: jax.Array, layers: jax.Ref) -> tuple[jax.Array, int, int]:
  return layers[index], 0, 0


def _cost(rows: jax.Array, num_held: int, other_bytes: int) -> pl.CostEstimate:
  """What a kernel does and moves, which the compiler cannot see."""
  num_blocks, depth, block = rows.shape
  return pl.CostEstimate(
    flops=2 * num_blocks * block * num_held * depth,
    transcendentals=0,
    bytes_accessed=rows.nbytes + 4 * num_blocks * block + other_bytes,
  )


def _nearest_body(
  layers: jax.Ref, vectors: jax.Ref, tables: jax.Ref, codes: jax.Ref
) -> None:
  """The codes of one block."""
  del layers  # the specs of the blocks have read it
  block = vectors.shape[2]
  place = lax.broadcasted_iota(jnp.int32, (_CHUNK, block), 0)
  best = jnp.full((1, block), jnp.inf, jnp.float32)
  chosen = jnp.zeros((1, block), jnp.int32)
  for start in range(0, tables.shape[2], _CHUNK):
    score = _product(
      tables[0, :, start : start + _CHUNK], vectors[0], contracted=0
    )
    least = score.min(axis=0, keepdims=True)
    first = jnp.where(score == least, place, _CHUNK).min(axis=0, keepdims=True)
    closer = least < best
    best = jnp.where(closer, least, best)
    chosen = jnp.where(closer, first + start, chosen)
  codes[0] = chosen


def _sums_body(
  layers: jax.Ref, digits: jax.Ref, codes: jax.Ref, totals: jax.Ref
) -> None:
  """Adds one block. Sums stay in vector memory until the layer changes."""
  index = pl.program_id(0)
  last = layers[jnp.maximum(index - 1, 0)]

  @pl.when((index == 0) | (layers[index] != last))
  def _() -> None:
    totals[...] = jnp.zeros_like(totals)

  place = lax.broadcasted_iota(jnp.int32, (_CHUNK, digits.shape[2]), 0)
  for start in range(0, totals.shape[2], _CHUNK):
    chosen = (place + start == codes[0]).astype(jnp.bfloat16)
    added = _product(digits[0], chosen, contracted=1)
    held = totals[0, :, start : start + _CHUNK]
    totals[0, :, start : start + _CHUNK] = held + added.astype(jnp.int32)


def _product(
  left: jax.Array, right: jax.Array, *, contracted: int
) -> jax.Array:
  dimensions = (((contracted,), (contracted,)), ((), ()))
  return lax.dot_general(
    left, right, dimensions, preferred_element_type=jnp.float32
  )

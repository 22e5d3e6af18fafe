"""The backend of TPUs: Pallas kernels for nearest centroids and for sums.

Both are matrix products of bfloat16 numbers that are exact: scores are products
of the bf16 split (`pqf_jax.numerics.bf16_split`), sums are products of the
words' digits with which-centroid-is-chosen, 0 or 1. Neither scores nor that
matrix leave the chip's vector memory, and narrow arrays of integers, which
would be padded to 128 lanes, do not occur: sub-vectors lie along the lanes.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from pqf_jax.kmeans import assignment, batching
from pqf_jax.kmeans.backends import base
from pqf_jax.numerics import bf16_split, segments

MOST_ROWS = 2**23
"""The number of digits, of 8 bits, that can be added to an int32."""

# Centroids of one product.
_CHUNK = 256


class _Prepared(NamedTuple):
  """The operands of the kernels.

  Attributes:
    points: for their scales.
    vectors: [B, depth, 1024] bfloat16, from `bf16_split.split_vectors`.
    digits: [B, 4 D + 4, 1024] bfloat16: the lower 8 bits of every word, then
      the upper ones.
  """

  points: base.Points
  vectors: jax.Array
  digits: jax.Array


def _prepare(points: base.Points) -> _Prepared:
  # Words along the second axis: a short last one would be padded to 128.
  layers = points.layout.layers
  fractions = jnp.stack(points.columns, 1) / points.scale[layers][:, :, None]
  pairs = jnp.stack(segments.split_words(fractions), axis=2)
  norms = segments.to_word(points.norms / points.norm_scale[layers])
  words = jnp.concatenate(
    [
      pairs.reshape(norms.shape[0], -1, norms.shape[1]),
      norms[:, None].astype(jnp.int32),
      batching.mask(points.layout)[:, None].astype(jnp.int32),
    ],
    axis=1,
  )
  digits = segments.to_digits(words, axis=1)
  return _Prepared(points, bf16_split.split_vectors(points.columns), digits)


def _codes(prepared: _Prepared, codebooks: jax.Array) -> jax.Array:
  return nearest(
    prepared.vectors,
    assignment.score_tables(codebooks),
    prepared.points.layout.layers,
  )


def _sums(
  prepared: _Prepared, codes: jax.Array, num_codes: int, most_rows: int
) -> jax.Array:
  del most_rows  # `loop` takes this backend up to `MOST_ROWS` only.
  layout = prepared.points.layout
  return sums(
    prepared.digits, codes, layout.layers, layout.sizes.size, num_codes
  )


def _totals(prepared: _Prepared, integers: jax.Array) -> base.Totals:
  words = segments.from_digits(jnp.moveaxis(integers, 1, 2), axis=2)
  return base.totals_of_words(prepared.points, segments.merge(*words))


BACKEND = base.Backend(_prepare, _codes, _sums, _totals)


def nearest(
  vectors: jax.Array,
  tables: jax.Array,
  layers: jax.Array,
  *,
  interpret: bool = False,
) -> jax.Array:
  """Returns the nearest centroid of every sub-vector, [B, 1024] int32.

  Under `vmap` it runs once after the other.

  Args:
    vectors: [B, depth, 1024] bfloat16, from `bf16_split.split_vectors`.
    tables: [L, K, D + 1] float32; row (r, f) scores x by r + <x, f>, and the
      lowest index wins a tie.
    layers: [B] int32, the table that a tile is scored with; ascending.
    interpret: whether to run it with Pallas's interpreter, for tests on a CPU.
  """
  num_tiles, depth, tile = vectors.shape

  @jax.custom_batching.sequential_vmap
  def run(
    vectors: jax.Array, tables: jax.Array, layers: jax.Array
  ) -> jax.Array:
    tables = bf16_split.split_tables(tables, unit=_CHUNK)
    num_held = tables.shape[2]
    codes = pl.pallas_call(
      _nearest_body,
      out_shape=jax.ShapeDtypeStruct((num_tiles, 1, tile), jnp.int32),
      grid_spec=tpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(num_tiles,),
        in_specs=[
          pl.BlockSpec((1, depth, tile), _of_tile),
          pl.BlockSpec((1, depth, num_held), _of_layer),
        ],
        out_specs=pl.BlockSpec((1, 1, tile), _of_tile),
      ),
      cost_estimate=_cost(vectors, num_held, tables.nbytes),
      interpret=interpret,
    )(layers, vectors, tables)
    return codes[:, 0]

  return run(vectors, tables, layers)


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

  Under `vmap` it runs once after the other.

  Args:
    digits: [B, W, 1024] bfloat16, whole numbers up to 256 in absolute value.
    codes: [B, 1024] int32.
    layers: [B] int32, the layer of a tile; ascending.
    num_layers: L; each has a tile.
    num_codes: K.
    interpret: whether to run it with Pallas's interpreter, for tests on a CPU.
  """
  num_tiles, num_digits, tile = digits.shape
  num_held = pl.cdiv(num_codes, _CHUNK) * _CHUNK

  @jax.custom_batching.sequential_vmap
  def run(digits: jax.Array, codes: jax.Array, layers: jax.Array) -> jax.Array:
    added = pl.pallas_call(
      _sums_body,
      out_shape=jax.ShapeDtypeStruct(
        (num_layers, num_digits, num_held), jnp.int32
      ),
      grid_spec=tpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(num_tiles,),
        in_specs=[
          pl.BlockSpec((1, num_digits, tile), _of_tile),
          pl.BlockSpec((1, 1, tile), _of_tile),
        ],
        out_specs=pl.BlockSpec((1, num_digits, num_held), _of_layer),
      ),
      cost_estimate=_cost(
        digits, num_held, 4 * num_layers * num_digits * num_held
      ),
      interpret=interpret,
    )(layers, digits, codes[:, None])
    return added[:, :, :num_codes]

  return run(digits, codes, layers)


def _of_tile(index: jax.Array, _: jax.Ref) -> tuple[jax.Array, int, int]:
  return index, 0, 0


def _of_layer(index: jax.Array, layers: jax.Ref) -> tuple[jax.Array, int, int]:
  return layers[index], 0, 0


def _cost(rows: jax.Array, num_held: int, other_bytes: int) -> pl.CostEstimate:
  """Returns the work and traffic of a kernel, which the compiler cannot see."""
  num_tiles, depth, tile = rows.shape
  return pl.CostEstimate(
    flops=2 * num_tiles * tile * num_held * depth,
    transcendentals=0,
    bytes_accessed=rows.nbytes + 4 * num_tiles * tile + other_bytes,
  )


def _nearest_body(
  layers: jax.Ref, vectors: jax.Ref, tables: jax.Ref, codes: jax.Ref
) -> None:
  """Finds the codes of one tile."""
  del layers  # the block specs have read it
  tile = vectors.shape[2]
  place = lax.broadcasted_iota(jnp.int32, (_CHUNK, tile), 0)
  best = jnp.full((1, tile), jnp.inf, jnp.float32)
  chosen = jnp.zeros((1, tile), jnp.int32)
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
  """Adds one tile. Sums stay in vector memory until the layer changes."""
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

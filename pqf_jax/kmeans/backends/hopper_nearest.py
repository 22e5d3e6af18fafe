"""Nearest centroid as a Pallas kernel for NVIDIA Hopper and later.

The matrix units compute the scores (`pqf_jax.numerics.bf16_split`), 64
sub-vectors by 64 centroids at a time, into registers. A thread then spends 3
instructions a pair: compare, and choose the smaller score and its index.
Arithmetic without matrix units needs D + 3.

It uses Pallas's default backend for NVIDIA (Mosaic GPU).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu

from pqf_jax import nvidia
from pqf_jax.numerics import bf16_split

# Sub-vectors of one matrix product (a strip of a tile), and the columns of it
# whose minima a thread carries side by side.
_ROWS = 64
_FOLD = 8

# Centroids of one matrix product: fewer leave registers for a second tile on a
# multiprocessor, more are 2 to 7 % faster if there is none.
_COLUMNS = 64
_MOST_COLUMNS = 128

# Strips that a warpgroup has in shared memory: while it works on one, the other
# arrives.
_SLOTS = 2


def fits(length: int, num_codes: int) -> bool:
  """Returns whether a codebook [K, D] fits into shared memory."""
  return _fits(bf16_split.depth(length), num_codes, num_warpgroups=1)


def nearest(
  vectors: jax.Array,
  tables: jax.Array,
  layers: jax.Array,
  excluded: jax.Array | None = None,
  *,
  interpret: Any = None,
) -> jax.Array:
  """Returns the row of a table with the smallest score, for every sub-vector.

  The lowest index wins a tie. Under `vmap` it runs once after the other.

  Args:
    vectors: [B, depth, 1024] bfloat16, from `bf16_split.split_vectors`.
    tables: [L, K, D + 1] float32; row (r, f) scores x by r + <x, f>.
    layers: [B] int32, the table that a tile is scored with.
    excluded: [B, 1024] int32, a row that each sub-vector may not choose, or
      None.
    interpret: the interpreter of Pallas to run it with, for tests on a CPU.

  Returns:
    codes, [B, 1024] int32.
  """
  arrays = [vectors, tables, layers]
  if excluded is not None:
    arrays.append(excluded)
  return _nearest(interpret)(*arrays)


@functools.cache  # jax traces a function again if it is not the same object
def _nearest(interpret: Any) -> Callable[..., jax.Array]:
  @jax.custom_batching.sequential_vmap
  def run(*arrays: jax.Array) -> jax.Array:
    vectors, tables, layers, *excluded = arrays
    tables = bf16_split.split_tables(tables, unit=_COLUMNS)
    num_tiles, depth, tile = vectors.shape
    num_codes = tables.shape[2]
    num_warpgroups = 4 if _fits(depth, num_codes, 4) else 1
    parts = 1
    while (
      2 * parts * num_tiles <= nvidia.NUM_PROCESSORS
      and 2 * parts * num_warpgroups * _ROWS <= tile
    ):
      parts *= 2
    single = (
      num_tiles <= nvidia.NUM_PROCESSORS and num_codes % _MOST_COLUMNS == 0
    )
    columns = _MOST_COLUMNS if single else _COLUMNS
    shape = num_warpgroups, _SLOTS, depth, _ROWS
    layout = {"transforms": _transforms(depth)}
    kernel = gpu.kernel(
      functools.partial(_body, columns=columns, parts=parts),
      out_type=jax.ShapeDtypeStruct((num_tiles, tile), jnp.int32),
      scratch_types=[
        gpu.SMEM((depth, num_codes), jnp.bfloat16, **layout),
        gpu.SMEM(shape, jnp.bfloat16, **layout),
        gpu.Barrier(num_arrivals=1),
        gpu.Barrier(num_arrivals=1, num_barriers=num_warpgroups * _SLOTS),
      ],
      grid=(num_tiles * parts,),
      grid_names=("part",),
      num_threads=num_warpgroups,
      thread_name="warpgroup",
      interpret=interpret,
    )
    return kernel(vectors, tables, layers, *excluded)

  return run


def _transforms(depth: int) -> tuple[gpu.TilingTransform, gpu.SwizzleTransform]:
  """Returns the layout of shared memory for products of a depth."""
  swizzle = min(128, 2 * depth)
  return gpu.TilingTransform((8, swizzle // 2)), gpu.SwizzleTransform(swizzle)


def _fits(depth: int, num_codes: int, num_warpgroups: int) -> bool:
  held = num_codes + -num_codes % _COLUMNS
  rows = held + num_warpgroups * _SLOTS * _ROWS
  return 2 * depth * rows <= nvidia.SHARED_BYTES


def _body(
  vectors: jax.Ref,
  tables: jax.Ref,
  layers: jax.Ref,
  *others: jax.Ref,
  columns: int,
  parts: int,
) -> None:
  """Finds the codes of a part of a tile; its warpgroups share the table."""
  *excluded, codes, table, strips, table_arrived, strip_arrived = others
  part, warpgroup = lax.axis_index("part"), lax.axis_index("warpgroup")
  tile = lax.div(part, parts)
  share = codes.shape[1] // (parts * strips.shape[0])
  num_strips = share // _ROWS
  first = (lax.rem(part, parts) * strips.shape[0] + warpgroup) * share

  def rows(strip: jax.Array | int) -> pl.Slice:
    return pl.ds(first + strip * _ROWS, _ROWS)

  def excluded_eights(strip: jax.Array | int) -> list[jax.Array]:
    return [_eights(ref.at[tile, rows(strip)]) for ref in excluded]

  def fetch(strip: jax.Array | int, slot: jax.Array | int) -> None:
    gpu.copy_gmem_to_smem(
      vectors.at[tile, :, rows(strip)],
      strips.at[warpgroup, slot],
      strip_arrived.at[warpgroup * _SLOTS + slot],
    )

  @pl.when(warpgroup == 0)
  def _() -> None:
    gpu.copy_gmem_to_smem(tables.at[layers[tile]], table, table_arrived)

  for slot in range(min(_SLOTS, num_strips)):
    fetch(slot, slot)
  eights = excluded_eights(0)
  gpu.barrier_wait(table_arrived)

  def step(strip: jax.Array, eights: list[jax.Array]) -> list[jax.Array]:
    # A strip ahead, because they come from global memory.
    after = excluded_eights(lax.min(strip + 1, num_strips - 1))
    slot = lax.rem(strip, _SLOTS)
    gpu.barrier_wait(strip_arrived.at[warpgroup * _SLOTS + slot])
    here = strips.at[warpgroup, slot].transpose((1, 0))
    best = _best(here, table, columns, eights)

    @pl.when(strip + _SLOTS < num_strips)
    def _() -> None:
      fetch(strip + _SLOTS, slot)

    codes[tile, rows(strip)] = _lowest(*best)
    return after

  lax.fori_loop(0, num_strips, step, eights)


def _best(
  strip: jax.Ref, table: jax.Ref, columns: int, excluded: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """Finds the smallest score among every 8th centroid, and its index.

  Both are [64, 8]. The index counts eights, as `excluded` does, and is the
  lowest in a tie.
  """
  shape = _ROWS, _FOLD

  def scores(first: jax.Array) -> jax.Array:
    def product(accumulator: jax.Ref) -> jax.Array:
      gpu.wgmma(accumulator, strip, table.at[:, pl.ds(first, columns)])
      return accumulator[...]

    shape = _ROWS, columns
    return pl.run_scoped(product, gpu.ACC(shape, jnp.float32))

  def step(
    chunk: jax.Array, best: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, jax.Array]:
    chunk_scores = scores(chunk * columns)
    value, index = best
    for i in range(columns // _FOLD):
      score = lax.slice(chunk_scores, (0, i * _FOLD), (_ROWS, (i + 1) * _FOLD))
      closer = score < value
      eight = jnp.full(shape, chunk * (columns // _FOLD) + i, jnp.int32)
      for excluded_eight in excluded:
        closer &= eight != excluded_eight
      value = jnp.where(closer, score, value)
      index = jnp.where(closer, eight, index)
    return value, index

  start = _full(jnp.inf, jnp.float32), _full(0, jnp.int32)
  return lax.fori_loop(0, table.shape[1] // columns, step, start)


def _lowest(value: jax.Array, index: jax.Array) -> jax.Array:
  """Returns the index of a row's smallest value, the lowest in a tie: [64]."""
  least = lax.broadcast_in_dim(value.min(axis=1), value.shape, (0,))
  candidates = index * _FOLD + _column()
  none = _full(jnp.iinfo(jnp.int32).max, jnp.int32)
  return jnp.where(value == least, candidates, none).min(axis=1)


def _eights(codes: jax.Ref) -> jax.Array:
  """Converts [64] codes to [64, 8]: eights in a code's column, -1 elsewhere."""
  layout = gpu.Layout.WGMMA.reduce(1)
  code = gpu.load(codes, layout=layout, optimized=False)
  code = lax.broadcast_in_dim(code, (_ROWS, _FOLD), (0,))
  return jnp.where(code % _FOLD == _column(), code // _FOLD, -1)


def _column() -> jax.Array:
  column = lax.broadcasted_iota(jnp.int32, (_ROWS, _FOLD), 1)
  return gpu.layout_cast(column, gpu.Layout.WGMMA)


def _full(value: float, dtype: jax.typing.DTypeLike) -> jax.Array:
  filled = jnp.full((_ROWS, _FOLD), value, dtype)
  return gpu.layout_cast(filled, gpu.Layout.WGMMA)

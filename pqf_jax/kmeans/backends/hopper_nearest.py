"""Nearest centroid as a Pallas kernel for NVIDIA Hopper and later.

The matrix units compute the scores (`pqf_jax.numerics.bf16_split`), 64
sub-vectors by 64 centroids at a time, into registers. What remains for a thread
is 3 instructions a pair: compare, and choose the smaller score and its index.
Arithmetic without matrix units needs D + 3.

It uses Pallas's default backend for NVIDIA (Mosaic GPU).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu

from pqf_jax.numerics import bf16_split

FIRST_JAX = (0, 11)
"""The backend's functions had other arguments before."""

# Sub-vectors of one matrix product, and the columns of it whose minima a thread
# carries side by side.
_ROWS = 64
_FOLD = 8

# Centroids of one matrix product: fewer leave registers for a second block on a
# multiprocessor, more are 2 to 7 % faster if there is none.
_COLUMNS = 64
_MOST_COLUMNS = 128

# Tiles of sub-vectors that a warpgroup has in shared memory: while it works on
# one, the other arrives.
_SLOTS = 2

# Of an H100 or H200, shared memory less what the backend takes.
_NUM_PROCESSORS = 132
_SHARED_BYTES = 232448 - 4096


@functools.cache
def is_available() -> bool:
  """Whether this process has such a GPU, and a jax that can use it."""
  if jax.__version_info__ < FIRST_JAX:
    return False
  try:
    devices = jax.local_devices(backend="cuda")
  except RuntimeError:
    return False
  return all(float(d.compute_capability) >= 9 for d in devices)


def fits(length: int, num_codes: int) -> bool:
  """Whether a codebook [K, D] fits into shared memory."""
  return _fits(bf16_split.depth(length), num_codes, num_warpgroups=1)


def nearest(
  vectors: jax.Array,
  tables: jax.Array,
  layers: jax.Array,
  own: jax.Array | None = None,
  *,
  num_warpgroups: int | None = None,
  interpret: Any = None,
) -> jax.Array:
  """Returns the row of a table with the smallest score, for every sub-vector.

  The lowest index wins a tie.

  Args:
    vectors: [B, depth, 1024] bfloat16, from `pieces.of_vectors`.
    tables: [L, K, D + 1] float32; row (r, f) scores x by r + <x, f>.
    layers: [B] int32, which table a block is scored with.
    own: [B, 1024] int32, a row that each sub-vector passes over, or None.
    num_warpgroups: that share a block, or a part of one where there are few,
      1, 2 or 4; None: 4 if they fit.
    interpret: the interpreter of Pallas to run it with, for tests on a CPU.

  Returns:
    codes, [B, 1024] int32.
  """
  tables = bf16_split.of_tables(tables, unit=_COLUMNS)
  num_blocks, depth, block = vectors.shape
  num_codes = tables.shape[2]
  if num_warpgroups is None:
    num_warpgroups = 4 if _fits(depth, num_codes, 4) else 1
  parts = 1
  while (
    2 * parts * num_blocks <= _NUM_PROCESSORS
    and 2 * parts * num_warpgroups * _ROWS <= block
  ):
    parts *= 2
  single = num_blocks <= _NUM_PROCESSORS and num_codes % _MOST_COLUMNS == 0
  columns = _MOST_COLUMNS if single else _COLUMNS
  transforms = _transforms(depth)
  kernel = gpu.kernel(
    functools.partial(_body, columns=columns, parts=parts),
    out_type=jax.ShapeDtypeStruct((num_blocks, block), jnp.int32),
    scratch_types=[
      gpu.SMEM((depth, num_codes), jnp.bfloat16, transforms=transforms),
      gpu.SMEM(
        (num_warpgroups, _SLOTS, depth, _ROWS),
        jnp.bfloat16,
        transforms=transforms,
      ),
      gpu.Barrier(num_arrivals=1),
      gpu.Barrier(num_arrivals=1, num_barriers=num_warpgroups * _SLOTS),
    ],
    grid=(num_blocks * parts,),
    grid_names=("part",),
    num_threads=num_warpgroups,
    thread_name="warpgroup",
    interpret=interpret,
  )
  passed_over = () if own is None else (own,)
  return kernel(vectors, tables, layers, *passed_over)


def _transforms(depth: int) -> tuple[gpu.TilingTransform, gpu.SwizzleTransform]:
  """How shared memory is laid out for products of that depth."""
  swizzle = min(128, 2 * depth)
  return gpu.TilingTransform((8, swizzle // 2)), gpu.SwizzleTransform(swizzle)


def _fits(depth: int, num_codes: int, num_warpgroups: int) -> bool:
  held = num_codes + -num_codes % _COLUMNS
  rows = held + num_warpgroups * _SLOTS * _ROWS
  return 2 * depth * rows <= _SHARED_BYTES


def _body(
  vectors: jax.Ref,
  tables: jax.Ref,
  layers: jax.Ref,
  *others: jax.Ref,
  columns: int,
  parts: int,
) -> None:
  """One of the parts of a block; its warpgroups share the table."""
  *own, codes, table, tiles, table_arrived, tile_arrived = others
  part, warpgroup = lax.axis_index("part"), lax.axis_index("warpgroup")
  block = lax.div(part, parts)
  share = codes.shape[1] // (parts * tiles.shape[0])
  num_tiles = share // _ROWS
  first = (lax.rem(part, parts) * tiles.shape[0] + warpgroup) * share

  def rows(tile: jax.Array | int) -> pl.Slice:
    return pl.ds(first + tile * _ROWS, _ROWS)

  def passed_over(tile: jax.Array | int) -> list[jax.Array]:
    return [_eights(ref.at[block, rows(tile)]) for ref in own]

  def fetch(tile: jax.Array | int, slot: jax.Array | int) -> None:
    gpu.copy_gmem_to_smem(
      vectors.at[block, :, rows(tile)],
      tiles.at[warpgroup, slot],
      tile_arrived.at[warpgroup * _SLOTS + slot],
    )

  @pl.when(warpgroup == 0)
  def _() -> None:
    gpu.copy_gmem_to_smem(tables.at[layers[block]], table, table_arrived)

  for slot in range(min(_SLOTS, num_tiles)):
    fetch(slot, slot)
  passed = passed_over(0)
  gpu.barrier_wait(table_arrived)

  def step(tile: jax.Array, passed: list[jax.Array]) -> list[jax.Array]:
    # A tile ahead, because they come from global memory.
    after = passed_over(lax.min(tile + 1, num_tiles - 1))
    slot = lax.rem(tile, _SLOTS)
    gpu.barrier_wait(tile_arrived.at[warpgroup * _SLOTS + slot])
    mine = tiles.at[warpgroup, slot].transpose((1, 0))
    best = _best(mine, table, columns, passed)

    @pl.when(tile + _SLOTS < num_tiles)
    def _() -> None:
      fetch(tile + _SLOTS, slot)

    codes[block, rows(tile)] = _first(*best)
    return after

  lax.fori_loop(0, num_tiles, step, passed)


def _best(
  tile: jax.Ref,
  table: jax.Ref,
  columns: int,
  passed_over: Sequence[jax.Array],
) -> tuple[jax.Array, jax.Array]:
  """Smallest score and its index over every 8th centroid, [64, 8] both.

  The index counts eights; that of a tie is the lowest. What is passed over is
  counted alike.
  """
  shape = _ROWS, _FOLD

  def scores(first: jax.Array) -> jax.Array:
    def product(accumulator: jax.Ref) -> jax.Array:
      gpu.wgmma(accumulator, tile, table.at[:, pl.ds(first, columns)])
      return accumulator[...]

    shape = _ROWS, columns
    return pl.run_scoped(product, gpu.ACC(shape, jnp.float32))

  def step(
    chunk: jax.Array, best: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, jax.Array]:
    found = scores(chunk * columns)
    value, index = best
    for i in range(columns // _FOLD):
      score = lax.slice(found, (0, i * _FOLD), (_ROWS, (i + 1) * _FOLD))
      closer = score < value
      eight = jnp.full(shape, chunk * (columns // _FOLD) + i, jnp.int32)
      for passed in passed_over:
        closer &= eight != passed
      value = jnp.where(closer, score, value)
      index = jnp.where(closer, eight, index)
    return value, index

  start = _full(jnp.inf, jnp.float32), _full(0, jnp.int32)
  return lax.fori_loop(0, table.shape[1] // columns, step, start)


def _first(value: jax.Array, index: jax.Array) -> jax.Array:
  """The index of the smallest value of a row, the lowest in a tie, [64]."""
  least = lax.broadcast_in_dim(value.min(axis=1), value.shape, (0,))
  candidates = index * _FOLD + _column()
  none = _full(jnp.iinfo(jnp.int32).max, jnp.int32)
  return jnp.where(value == least, candidates, none).min(axis=1)


def _eights(codes: jax.Ref) -> jax.Array:
  """[64] codes -> [64, 8]: the eight of a code in its column, -1 elsewhere."""
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

"""Exact sums by segment as a Pallas kernel for NVIDIA Hopper and later.

A tile of 1024 rows adds its words (`pqf_jax.numerics.segments`) to sums of its
own in shared memory, one atomic addition of an integer each, and then these
sums to those of its layer in global memory. XLA's scatter adds every row in
global memory.

It uses Pallas's default backend for NVIDIA (Mosaic GPU), and from the library
below it an operation that Pallas lacks: addition at addresses that are data.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mosaic
from jax.experimental.pallas import mosaic_gpu as gpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pqf_jax import nvidia

# Threads of a warpgroup, which Mosaic calls one thread.
_NUM_THREADS = 128
_NUM_WARPGROUPS = 4

# Columns of an array that one copy of Mosaic may move.
_MOST_COPIED = 256

_WORD_BITS = 15


def fits(num_columns: int, num_segments: int) -> bool:
  """Returns whether a tile's sums fit into shared memory."""
  return 8 * num_columns * _held(num_segments) <= nvidia.SHARED_BYTES


def sums(
  columns: Sequence[jax.Array],
  codes: jax.Array,
  layers: jax.Array,
  units: jax.Array,
  num_segments: int,
  *,
  num_coarse: int,
) -> jax.Array:
  """Adds up, in integers, the rows of each segment of each layer.

  A number x times its unit u is taken as `high + low * 2^-15`, two integers,
  the first nearest to x u. Under `vmap` it runs once after the other.

  Args:
    columns: C arrays [B, 1024] float32.
    codes: [B, 1024] int32, the segment of a row in its layer.
    layers: [B] int32, the layer of a tile.
    units: [L, C] float32, powers of two; |x| u is at most 2^14.
    num_segments: K of a layer.
    num_coarse: number of the last columns whose low words are left out.

  Returns:
    [L, 2 C, K] int32: a column's low words, its high words, ... Low words have
    grown to B * 2^15 at most.
  """
  held = _held(num_segments)
  shape = held // _chunk(held), 2 * len(columns), _chunk(held)

  def body(*refs: jax.Ref) -> None:
    pl.run_scoped(
      functools.partial(_body, *refs, num_coarse=num_coarse),
      gpu.SMEM(shape, jnp.int32),
      gpu.Barrier(num_arrivals=_NUM_WARPGROUPS),
      collective_axes="warpgroup",
    )

  @jax.custom_batching.sequential_vmap
  def run(*arrays: jax.Array) -> jax.Array:
    *_, codes, _, units = arrays
    totals = jax.new_ref(jnp.zeros((units.shape[0], *shape), jnp.int32))
    mesh = gpu.Mesh(
      grid=codes.shape[:1],
      grid_names=("tile",),
      num_threads=_NUM_WARPGROUPS,
      thread_name="warpgroup",
    )
    pl.kernel(body, mesh=mesh)(*arrays, totals)
    joined = jnp.moveaxis(totals[...], 1, 2).reshape(-1, shape[1], held)
    return joined[:, :, :num_segments]

  return run(*columns, codes, layers, units)


def _chunk(held: int) -> int:
  """Returns how many segments one copy to global memory may move."""
  return min(held, _MOST_COPIED)


def _held(num_segments: int) -> int:
  """Returns K, filled up to whole chunks of whole vectors of a warpgroup."""
  unit = _NUM_THREADS if num_segments <= _NUM_THREADS else _MOST_COPIED
  return num_segments + -num_segments % unit


class _Vector:
  """One row of numbers in the registers of a warpgroup."""

  def __init__(self, size: int) -> None:
    self.size = size
    self.layout = gpu.Layout.WG_STRIDED(
      (size,), vec_size=min(4, size // _NUM_THREADS)
    )

  def load(self, ref: jax.Ref) -> jax.Array:
    return gpu.load(ref, layout=self.layout, optimized=False)

  def full(
    self, value: jax.typing.ArrayLike, dtype: jax.typing.DTypeLike
  ) -> jax.Array:
    return gpu.layout_cast(jnp.full((self.size,), value, dtype), self.layout)


def _body(*refs: jax.Ref, num_coarse: int) -> None:
  """Adds one tile; its warpgroups share the sums."""
  *columns, codes, layers, units, totals, sums, together = refs
  tile, warpgroup = lax.axis_index("tile"), lax.axis_index("warpgroup")
  layer = layers[tile]
  num_chunks, num_words, chunk = sums.shape
  share = codes.shape[1] // _NUM_WARPGROUPS
  rows, held = _Vector(share), _Vector(chunk)
  here = tile, pl.ds(warpgroup * share, share)

  def each(count: int, work: Callable[[jax.Array], None]) -> None:
    """Divides the indices below `count` among the warpgroups, then meets."""

    def step(turn: jax.Array, carry: None) -> None:
      index = turn * _NUM_WARPGROUPS + warpgroup
      pl.when(index < count)(lambda: work(index))
      return carry

    lax.fori_loop(0, -(-count // _NUM_WARPGROUPS), step, None)
    meet()

  def meet() -> None:
    gpu.commit_smem()
    gpu.barrier_arrive(together)
    gpu.barrier_wait(together)

  def clear(index: jax.Array) -> None:
    row = sums.at[index // num_words, lax.rem(index, num_words)]
    row[...] = held.full(0, jnp.int32)

  def carry_over(index: jax.Array) -> None:
    """Keeps low words below 2^15, so that many tiles can be added."""
    pair = sums.at[index // len(columns)]
    low = pair.at[2 * lax.rem(index, len(columns))]
    high = pair.at[2 * lax.rem(index, len(columns)) + 1]
    value = held.load(low)
    carried = value >> _WORD_BITS
    low[...] = value - (carried << _WORD_BITS)
    high[...] = held.load(high) + carried

  def flush(index: jax.Array) -> None:
    target = totals.at[layer, index]
    gpu.copy_smem_to_gmem(sums.at[index], target, reduction_op="add")

  each(num_chunks * num_words, clear)
  segments = rows.load(codes.at[here])
  for index, column in enumerate(columns):
    unit = rows.full(units[layer, index], jnp.float32)
    scaled = rows.load(column.at[here]) * unit
    high = _rounded(scaled)
    low = _rounded((scaled - high) * rows.full(2.0**_WORD_BITS, jnp.float32))
    _add(sums, 2 * index + 1, segments, high.astype(jnp.int32), rows.layout)
    if index < len(columns) - num_coarse:
      _add(sums, 2 * index, segments, low.astype(jnp.int32), rows.layout)
  meet()
  each(num_chunks * len(columns), carry_over)
  each(num_chunks, flush)
  gpu.wait_smem_to_gmem(0)


def _rounded(values: jax.Array) -> jax.Array:
  return lax.round(values, lax.RoundingMethod.TO_NEAREST_EVEN)


def _add(
  sums: jax.Ref, row: int, codes: jax.Array, words: jax.Array, layout: Any
) -> None:
  """Adds each word to the sum of its code; a thread adds those it holds."""
  _, num_rows, chunk = sums.shape

  @gpu.inline_mgpu(arg_types=(gpu.RefType(), layout, layout))
  def add(_: Any, sums: ir.Value, codes: Any, words: Any) -> tuple[()]:
    i32 = ir.IntegerType.get_signless(32)
    start = llvm.ptrtoint(i32, mosaic.utils.memref_ptr(sums))

    def constant(value: int) -> ir.Value:
      return arith.constant(i32, ir.IntegerAttr.get(i32, value))

    for code, word in zip(_elements(codes), _elements(words), strict=True):
      # All rows of a chunk lie before those of the next.
      skipped = arith.muli(
        arith.divui(code, constant(chunk)), constant(chunk * (num_rows - 1))
      )
      offset = arith.muli(arith.addi(skipped, code), constant(4))
      llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [arith.addi(start, offset), word],
        f"red.shared::cta.add.u32 [$0 + {4 * row * chunk}], $1;",
        "r,r",
        has_side_effects=True,
      )
    return ()

  add(sums, codes, words)


def _elements(array: Any) -> Iterator[ir.Value]:
  """Yields the numbers of an array that this thread holds."""
  for register in array.registers.flat:
    for lane in range(ir.VectorType(register.type).shape[0]):
      yield vector.extract(register, [], [lane])

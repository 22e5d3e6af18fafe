"""Products straight from codes as a kernel for NVIDIA Hopper and later.

A block of threads makes some outputs for all rows: it copies the codebook to
shared memory, and the matrix units multiply what the codes name there with the
activations. So the codes are the only weights that come from global memory, and
8 rows take hardly longer than one.

It uses Pallas's default backend for NVIDIA (Mosaic GPU) and inside of it a
program in PTX (`hopper_source`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mosaic
from jax.experimental.pallas import mosaic_gpu as gpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pqf_jax import nvidia
from pqf_jax.core import trees, vq_array
from pqf_jax.inference import hopper_source

# Bytes of one access to shared memory by a warp. Filling more copies of the
# codebook than _MOST_COPIED bytes takes longer than they save.
_ACCESS = 128
_MOST_COPIED = 2**16

# Entries of activations that a thread holds of a row, twice: more leave too few
# registers.
_MOST_HELD = 64

# Positions whose codes a thread loads at once, and codeword entries of these.
_POSITIONS_AHEAD = 4
_ENTRIES_AHEAD = 32

_WARPS_OF_GROUP = 4
_WARPS = 16


def make_plan(
  inputs: jax.ShapeDtypeStruct | jax.Array,
  codebook: jax.ShapeDtypeStruct | trees.Array,
  codes: jax.ShapeDtypeStruct | trees.Array,
  dtype: jax.typing.DTypeLike,
) -> hopper_source.Plan | None:
  """Returns how the kernel shares the work, or None if it cannot do it.

  None as well for more rows than it was seen to serve: 16, but 8 if D is 4 and
  codes lie apart, or if it is 16 and four codes lie side by side.

  Args:
    inputs: [B, M * D] bfloat16.
    codebook: [K, D] bfloat16 or float32; D is 4, 8 or 16.
    codes: [M, C_out] of the smallest type, or [N, C_out] uint32 of codes side
      by side; C_out is a multiple of 4.
    dtype: of the result, bfloat16 or float32.
  """
  (num_rows, c_in), (num_codes, length) = inputs.shape, codebook.shape
  num_positions, c_out = c_in // length, codes.shape[1]
  code_bytes = vq_array.code_dtype(num_codes).itemsize
  joined = codes.dtype.itemsize // code_bytes
  dtypes = {codebook.dtype, jnp.dtype(dtype)}
  if (
    inputs.dtype != jnp.bfloat16
    or not dtypes <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}
    or not jnp.issubdtype(codes.dtype, jnp.unsignedinteger)
    or joined * code_bytes not in (code_bytes, 4)
    or code_bytes > 2
    or joined * codes.shape[0] != num_positions
    or length not in (4, 8, 16)
    or c_out % 4
    or not 0 < num_rows <= _most_rows(length, joined)
  ):
    return None
  outputs = next(
    size
    for size in (4, 8, 16)
    if size == 16
    or c_out % (2 * size)
    or c_out <= nvidia.NUM_PROCESSORS * hopper_source.GROUPS * size
  )
  tiles = -(-c_out // (hopper_source.GROUPS * outputs))
  # Of all the steps of a block, each of its threads should have two.
  steps = -(-num_positions // hopper_source.MEMBERS)
  splits = max(1, min(nvidia.NUM_PROCESSORS // tiles, steps // (2 * _WARPS)))
  copies = _ACCESS // min(16, 2 * length)
  while copies > 1 and 2 * length * num_codes * copies > _MOST_COPIED:
    copies //= 2
  ahead = min(
    -(-steps // (_WARPS * splits)), _POSITIONS_AHEAD, _ENTRIES_AHEAD // length
  )
  plan = hopper_source.Plan(
    num_rows=num_rows,
    num_positions=num_positions,
    c_out=c_out,
    num_codes=num_codes,
    length=length,
    code_bytes=code_bytes,
    joined=joined,
    book_bytes=codebook.dtype.itemsize,
    out_bytes=jnp.dtype(dtype).itemsize,
    outputs=outputs,
    warps=_WARPS,
    splits=splits,
    copies=copies,
    ahead=max(1, ahead // joined),
  )
  return plan if plan.shared_size <= nvidia.SHARED_BYTES else None


def _most_rows(length: int, joined: int) -> int:
  # Codes of D = 4 that lie apart take as many loads as the dense product.
  is_slow = length == 4 and joined < 4
  tiles = 1 if is_slow else min(2, _MOST_HELD // (joined * length))
  return hopper_source.GROUPS * tiles


def product(
  inputs: jax.Array,
  codebook: jax.Array,
  codes: jax.Array,
  dtype: jax.typing.DTypeLike,
  plan: hopper_source.Plan,
) -> jax.Array:
  """Returns `inputs @ kernel`, [B, C_out], summed in float32.

  The weights are rounded to bfloat16. Under `vmap` it runs once after the
  other.
  """
  out_dtype = jnp.dtype(dtype) if plan.splits == 1 else jnp.dtype(jnp.float32)
  plan = plan._replace(out_bytes=out_dtype.itemsize)
  parts = _kernel(plan, out_dtype)(inputs, codebook, codes)
  return parts[0] if plan.splits == 1 else parts.sum(0).astype(dtype)


@functools.cache  # jax traces a function again if it is not the same object
def _kernel(
  plan: hopper_source.Plan, dtype: jnp.dtype
) -> Callable[..., jax.Array]:
  kernel = gpu.kernel(
    functools.partial(_body, hopper_source.write(plan)),
    out_type=jax.ShapeDtypeStruct(
      (plan.splits, plan.num_rows, plan.c_out), dtype
    ),
    scratch_types=[gpu.SMEM((plan.shared_size // 4,), jnp.int32)],
    grid=(plan.num_tiles * plan.splits,),
    grid_names=("block",),
    num_threads=plan.warps // _WARPS_OF_GROUP,
    thread_name="warpgroup",
  )
  return jax.custom_batching.sequential_vmap(
    lambda inputs, codebook, codes: kernel(inputs, codebook, codes)
  )


def _body(source: str, *refs: jax.Ref) -> None:
  @gpu.inline_mgpu(arg_types=(gpu.RefType(),) * len(refs))
  def run(_: Any, *refs: ir.Value) -> tuple[()]:
    *arrays, shared = (mosaic.utils.memref_ptr(ref) for ref in refs)
    i32, i64 = (ir.IntegerType.get_signless(size) for size in (32, 64))
    llvm.inline_asm(
      ir.Type.parse("!llvm.void"),
      [
        *(llvm.ptrtoint(i64, array) for array in arrays),
        llvm.ptrtoint(i32, shared),
      ],
      source,
      "l,l,l,l,r",
      has_side_effects=True,
    )
    return ()

  run(*refs)

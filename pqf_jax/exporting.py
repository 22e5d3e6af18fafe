"""Writes a network as one program that needs jax alone, codes and all.

The program is StableHLO with its variables inside: codes with exactly log2(K)
bits, and floats in the smallest type that holds them as they are, so that it is
about as large as the packed file. They are unpacked when it runs.
"""

import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import lax

from pqf_jax import errors, extras
from pqf_jax.core import modules, trees, vq_array
from pqf_jax.packing import bits, scaling
from pqf_jax.runtime import files

PyTree = Any
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
# The smallest first.
_SMALLER = ("int8", "float16")


def export(
  path: str | os.PathLike[str],
  apply_fn: Callable[..., PyTree],
  variables: PyTree,
  *sample: PyTree,
  platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> None:
  """Writes `apply_fn(variables, *inputs)` as a program; ~ is expanded.

      from jax import export
      program = export.deserialize(open(path, "rb").read())
      outputs = program.call(*inputs)

  runs it, without this library and without Flax. Variables are not rounded:
  give those of a file (`load`), whose codebooks are float16 or int8 already.

  Args:
    path: of the file.
    apply_fn: a function that JAX can trace, such as `model.apply`.
    variables: a tree or module of arrays and `VQArray`s.
    *sample: the inputs as arrays or `jax.ShapeDtypeStruct`s. Sizes may be
      symbols of `jax.export.symbolic_shape`, such as that of the batch.
    platforms: on which the program will run, of `PLATFORMS`.

  Raises:
    InputError: an unknown platform, a code without a codeword, or the module
      flatbuffers, which jax needs for this, is not installed.
  """
  unknown = sorted({*platforms} - {*PLATFORMS})
  if unknown or not platforms:
    raise errors.InputError(
      f"platforms is {tuple(platforms)}; give some of {', '.join(PLATFORMS)}"
    )
  try:
    importlib.import_module("flatbuffers")
  except ModuleNotFoundError as error:
    raise extras.explain(error) from error
  unpackers = jax.tree_util.tree_map_with_path(
    _unpacker, modules.seal(variables), is_leaf=vq_array.is_vq
  )

  def program(*inputs: PyTree) -> PyTree:
    unpacked = jax.tree.map(lambda unpack: unpack(), unpackers)
    return modules.call(apply_fn, unpacked, inputs)

  exported = jax.export.export(jax.jit(program), platforms=tuple(platforms))
  data = exported(*sample).serialize()
  files.write(files.absolute(path), bytes(data))


def _unpacker(key_path: tuple[Any, ...], leaf: Any) -> Callable[[], Any]:
  """Returns a function that makes a leaf while a program is traced."""
  if not vq_array.is_vq(leaf):
    return _array(leaf)
  num_codes, codes = leaf.codebook.shape[-2], np.asarray(leaf.codes)
  last = codes.max(initial=0)
  if last >= num_codes:
    raise errors.InputError(
      f"{trees.path_name(key_path)} has the code {last}, but {num_codes} "
      "codewords; quantize it again"
    )
  num_codes = max(num_codes, 2)  # codes of no bits would be no array
  packed = bits.pack_codes(codes, num_codes)
  codebook = _array(leaf.codebook)

  def unpack() -> vq_array.VQArray:
    flat = bits.unpack_traced(_constant(packed), num_codes, codes.size)
    return vq_array.VQArray(
      codebook(), flat.reshape(codes.shape), leaf.kernel_shape, leaf.spec
    )

  return unpack


def _array(leaf: Any) -> Callable[[], Any]:
  """Returns `_unpacker` of an array, which becomes as small as it can."""
  if not jnp.issubdtype(leaf.dtype, jnp.floating):
    return lambda: leaf
  array = np.asarray(leaf)
  wide = np.result_type(array.dtype, np.float32)
  for smaller in _SMALLER if np.isfinite(array).all() else ():
    numbers, exponent, _ = scaling.scale(array, smaller)
    power = np.ldexp(wide.type(1), exponent)
    with np.errstate(over="ignore"):
      restored = (numbers.astype(wide) * power).astype(array.dtype)
    # By bytes, because zero has a sign.
    is_smaller = numbers.nbytes < array.nbytes
    if is_smaller and restored.tobytes() == array.tobytes():
      return lambda: (_constant(numbers).astype(wide) * power).astype(
        array.dtype
      )
  return lambda: _constant(array)


def _constant(array: np.ndarray) -> jax.Array:
  """Returns a constant that XLA does not unpack while it compiles."""
  return lax.optimization_barrier(jnp.asarray(array))

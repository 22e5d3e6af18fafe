"""Conversion between the compressed files of the authors and Flax variables.

    params/layer1/0/conv1/kernel,   layer1.0.conv1.codes_matrix [C_out, M],
    a VQArray                         uint8, or int16 where K > 256
                                    layer1.0.conv1.codebook [K, D], float16
    params/bn1/scale, bias [n]      bn1.weight, bias: of a norm with mean 0,
    batch_stats/bn1/mean, var         variance 1 and epsilon 1e-5
    other variables                 as in `torch_names`

Sub-vectors have the same order in both layouts, see `blocks.BlockSpec`. The
files that the authors released are not for commercial use.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pqf_jax import errors
from pqf_jax.core import blocks, trees, vq_array
from pqf_jax.core import plan as plans
from pqf_jax.models import torch_names

PyTree = Any
# Divisor of a norm's weight when the authors' network computes.
ROOT = math.sqrt(1 + 1e-5)
CODES, CODEBOOK = ".codes_matrix", ".codebook"


def is_authors_layout(state_dict: Mapping[str, Any]) -> bool:
  """Returns whether a state dict has codes in the authors' layout."""
  return any(name.endswith(CODES) for name in state_dict)


def from_authors_layout(
  state_dict: Mapping[str, Any], template: PyTree, *, norm_epsilon: float = 1e-5
) -> PyTree:
  """Maps a state dict in the authors' layout to variables with `VQArray`s.

  Norms get mean 0 and variance 1 - epsilon, as in `pack.unpack_model`, so that
  packing and loading the variables changes no bit.

  Args:
    state_dict: {name: array}; every name must be used.
    template: the model's dense variables, as arrays or `ShapeDtypeStruct`s.
    norm_epsilon: of the model's norms.

  Raises:
    InputError: the weights are of another architecture (one message lists all
      names that are missing, extra or of another shape), codes point outside of
      their codebook, or a codebook does not fit its kernel.
  """
  arrays = {name: np.asarray(value) for name, value in state_dict.items()}
  flat = trees.flatten(template)
  norms = plans.foldable_norms(flat).values()
  modules = {path: _module(path) for path in flat if path.endswith("/kernel")}
  compressed = {
    path: module
    for path, module in modules.items()
    if {module + CODES, module + CODEBOOK} & arrays.keys()
  }
  statistics = {path for norm in norms for path in norm[2:]}
  shapes: dict[str, tuple[int, ...]] = {}
  for path, leaf in flat.items():
    if path in compressed:
      shapes |= _compressed_shapes(compressed[path], arrays, leaf.shape)
    elif path not in statistics:
      shapes[torch_names.torch_name(path)] = torch_names.torch_shape(path, leaf)
  codes = {module + CODES for module in compressed.values()}
  torch_names.check_fit(arrays, shapes, codes)

  nodes = {
    path: _vq_array(module, arrays, flat[path])
    for path, module in compressed.items()
  }
  dense = {path: leaf for path, leaf in flat.items() if path not in compressed}
  names = {path: torch_names.torch_name(path) for path in dense}
  entries = {name: arrays[name] for name in names.values() if name in arrays}
  for scale, _, mean, var in norms:
    weight = arrays[names[scale]].astype(np.float64) / ROOT
    entries[names[scale]] = weight.astype(np.float32)
    entries[names[mean]] = np.zeros(weight.shape, np.float32)
    entries[names[var]] = np.full(weight.shape, 1 - norm_epsilon, np.float32)
  filled = torch_names.torch_to_flax(entries, trees.nest(dense))
  return trees.replace(template, trees.flatten(filled) | nodes)


def to_authors_layout(
  variables: PyTree, *, norm_epsilon: float = 1e-5
) -> torch_names.StateDict:
  """Maps variables to the authors' layout; undoes `from_authors_layout`.

  Mean and variance are folded into weight and bias, and codebooks are rounded
  to float16. Otherwise only the last bit of a norm's weight may change.

  Args:
    variables: with `VQArray`s or all dense.
    norm_epsilon: of the model's norms.

  Raises:
    InputError: the layout cannot hold a kernel: it is stacked, cut along other
      axes, or has a codebook beyond the range of float16.
  """
  flat = trees.flatten(jax.device_get(variables), vq_array.is_vq)
  norms = plans.foldable_norms(flat).values()
  compressed = {path for path, leaf in flat.items() if vq_array.is_vq(leaf)}
  done = compressed.union(*norms)
  rest = {path: leaf for path, leaf in flat.items() if path not in done}
  state_dict = torch_names.flax_to_torch(trees.nest(rest))
  for path in compressed:
    state_dict |= _codes_and_codebook(path, flat[path])
  for norm in norms:
    scale, bias, mean, var = (np.float64(flat[path]) for path in norm)
    slope = scale / np.sqrt(var + norm_epsilon)
    folded = slope * ROOT, bias - mean * slope
    for path, vector in zip(norm[:2], folded, strict=True):
      state_dict[torch_names.torch_name(path)] = vector.astype(np.float32)
  return state_dict


def _module(path: str) -> str:
  """Returns 'layer1.0.conv1' for 'params/layer1/0/conv1/kernel'."""
  return torch_names.torch_name(path).rpartition(".")[0]


def _compressed_shapes(
  module: str, arrays: Mapping[str, np.ndarray], shape: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
  """Returns the shapes that codes and codebook of a kernel must have."""
  # The codebook's own shape says how it cuts the kernel; `_vq_array` checks it.
  *taps, c_in, c_out = shape
  row = c_in * math.prod(taps)
  # A missing codebook counts as one with one input channel a sub-vector.
  codebook = arrays.get(module + CODEBOOK, np.empty((1, math.prod(taps))))
  num_codes, length = np.atleast_2d(codebook).shape[-2:]
  return {
    module + CODES: (c_out, row // max(length, 1)),
    module + CODEBOOK: (num_codes, length),
  }


def _vq_array(
  module: str, arrays: Mapping[str, np.ndarray], leaf: Any
) -> vq_array.VQArray:
  codes, codebook = arrays[module + CODES], arrays[module + CODEBOOK]
  num_codes, length = codebook.shape
  taps = leaf.shape[:-2]
  if not length or length % math.prod(taps):
    raise errors.InputError(
      f"{module + CODEBOOK} has sub-vectors of {length} weights, which is not "
      f"a multiple of the {math.prod(taps)} taps of a kernel of size {taps}; "
      "choose the weights of another network"
    )
  spec = blocks.BlockSpec(length // math.prod(taps))
  spec.layout(leaf.shape)  # Refuses channels that the block does not divide.
  is_integer = np.issubdtype(codes.dtype, np.integer)
  if not is_integer or codes.min() < 0 or codes.max() >= num_codes:
    raise errors.InputError(
      f"{module + CODES} has codes from {codes.min()} to {codes.max()} of type "
      f"{codes.dtype}, but the {num_codes} codewords of {module + CODEBOOK} "
      f"need integers from 0 to {num_codes - 1}; the file is damaged, copy it "
      "again"
    )
  return vq_array.VQArray(
    jnp.array(codebook, leaf.dtype),
    jnp.array(codes, vq_array.code_dtype(num_codes)),
    tuple(leaf.shape),
    spec,
  )


def _codes_and_codebook(
  path: str, node: vq_array.VQArray
) -> torch_names.StateDict:
  if (
    node.codebook.ndim != 2 or blocks.BlockSpec(node.spec.channels) != node.spec
  ):
    raise errors.InputError(
      f"{path} is stacked, or cut along other axes than [..., in, out], which "
      "the authors' layout cannot hold; decode it by vq_array.decode_params"
    )
  num_codes = len(node.codebook)
  signed = np.min_scalar_type(-num_codes)  # int16 up to 32,768 codewords
  with np.errstate(over="ignore"):
    codebook = np.asarray(node.codebook).astype(np.float16)
  if not np.isfinite(codebook).all():
    raise errors.InputError(
      f"{path} has codewords beyond the range of float16 (largest "
      f"{np.abs(node.codebook).max():g}); lower the learning rate, since the "
      "training was probably unstable"
    )
  return {
    _module(path) + CODES: np.asarray(
      node.codes, np.uint8 if num_codes <= 256 else signed
    ),
    _module(path) + CODEBOOK: codebook,
  }

"""What a kernel may become, and what each option costs and loses."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from pqf_jax.allocation import distortion
from pqf_jax.core import blocks
from pqf_jax.core import plan as plans
from pqf_jax.core import storage as storages

PyTree = Any
Options = Sequence[plans.LayerPlan | None]
"""Ways to compress one kernel, and None: it stays dense. None is the last."""

_LEAST_BITS, _MOST_BITS = 4, 12  # of a code: 16 to 4,096 codewords
# Entries of a sub-vector of several channels; longer ones lose nearly all.
_MOST_LENGTH = 72


def list_options(
  kernel: Any, axes: blocks.KernelAxes, kmeans_steps: int
) -> Options:
  """Returns what a kernel may become: some blocks times powers of two of K.

  Args:
    kernel: array or `jax.ShapeDtypeStruct`.
    axes: what its axes are for.
    kmeans_steps: of all options.
  """
  options: list[plans.LayerPlan | None] = []
  spec = blocks.make_spec(1, axes, len(kernel.shape))
  shape = spec.layer_shape(kernel.shape)
  for channels in _doubling_divisors(shape[spec.in_axes[-1]]):
    spec = blocks.make_spec(channels, axes, len(kernel.shape))
    c_out, m, length = spec.layout(shape)
    if channels > 1 and length > _MOST_LENGTH:
      break
    bits = min(_MOST_BITS, int(math.log2(max(1, c_out * m // 4))))
    options += [
      plans.LayerPlan(spec, 1 << bit, kmeans_steps)
      for bit in range(_LEAST_BITS, bits + 1)
    ]
  is_float = jnp.issubdtype(kernel.dtype, jnp.floating)
  wide_enough = kernel.dtype.itemsize >= 2
  return [*(options if is_float and wide_enough else ()), None]


def _doubling_divisors(n: int) -> list[int]:
  """Returns divisors of n from 1 on, each at least twice the one before."""
  found = [1]
  for divisor in range(2, n + 1):
    if n % divisor == 0 and divisor >= 2 * found[-1]:
      found.append(divisor)
  return found


def option_bytes(
  options: Mapping[str, Options], variables: PyTree, storage: storages.Storage
) -> dict[str, np.ndarray]:
  """Returns {path: packed bytes of each option}."""
  sizes: dict[str, list[int]] = {path: [] for path in options}
  for i in range(max(map(len, options.values()))):
    chosen = {p: every[min(i, len(every) - 1)] for p, every in options.items()}
    report = plans.predict_size(plan_of(chosen), variables, storage)
    rows = {row.path: row.payload_bytes for row in report.layers}
    for path, every in options.items():
      if i < len(every):
        sizes[path].append(rows[path])
  return {path: np.array(size) for path, size in sizes.items()}


def plan_of(
  chosen: Mapping[str, plans.LayerPlan | None],
) -> plans.CompressionPlan:
  """Returns the plan of the kernels that do not stay dense."""
  return {path: layer for path, layer in chosen.items() if layer is not None}


def option_distortions(kernel: Any, options: Options) -> np.ndarray:
  """Returns the predicted distortion of each option.

  The mean over the layers of a stack; see `distortion.predict_distortions`.
  """
  layers = [layer for layer in options if layer is not None]
  by_bits = {
    spec: _mean_distortions(kernel, spec, max(_code_bits(layers, spec)))
    for spec in dict.fromkeys(layer.spec for layer in layers)
  }
  return np.array(
    [
      0 if layer is None else by_bits[layer.spec][_bits(layer)]
      for layer in options
    ]
  )


def _bits(layer: plans.LayerPlan) -> int:
  return plans.code_bits(layer.num_codes)


def _code_bits(
  layers: Sequence[plans.LayerPlan], spec: blocks.BlockSpec
) -> list[int]:
  return [_bits(layer) for layer in layers if layer.spec == spec]


def _mean_distortions(
  kernel: Any, spec: blocks.BlockSpec, bits: int
) -> np.ndarray:
  count = math.prod(spec.stack_shape(kernel.shape))
  return np.mean(
    [
      distortion.predict_distortions(spec.take_layer(kernel, i), spec, bits)
      for i in range(count)
    ],
    axis=0,
  )

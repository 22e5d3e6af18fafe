"""The paper's rules, for networks whose layers nobody has named."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from pqf_jax.allocation import first_layers
from pqf_jax.core import blocks, trees
from pqf_jax.core import plan as plans
from pqf_jax.discovery import kernels as kernel_discovery

PyTree = Any

_LEAST_VECTORS = 8  # of which two codewords can be made
_LINEAR_CHANNELS = 4


def paper_small(
  apply_fn: Callable[..., PyTree],
  variables: PyTree,
  *sample: PyTree,
  pointwise_channels: int = 4,
  linear_codes: int = 2048,
) -> list[plans.Rule]:
  """Returns the paper's rules with small blocks (its section 4.1).

  The first layer stays dense. A convolution gets 256 codewords of one input
  channel with all taps, a 1x1 convolution 256 of some channels, a linear layer
  more, of four channels. Fewer channels share a sub-vector where a layer's
  cannot be divided so.

  Args:
    apply_fn: `apply_fn(variables, *sample)`, a network in inference mode.
    variables: variable tree; shapes suffice.
    *sample: a small example of its inputs; shapes suffice.
    pointwise_channels: channels of a 1x1 convolution that share a sub-vector.
    linear_codes: codewords of a linear layer: 2,048 in the paper's ResNet-18,
      1,024 in its ResNet-50.

  Returns:
    One rule for each kernel.

  Raises:
    InputError: the apply function cannot be traced, or a number is out of
      range.
  """
  block = _Blocks(1, pointwise_channels, linear_codes)
  return _paper(apply_fn, variables, sample, block)


def paper_large(
  apply_fn: Callable[..., PyTree],
  variables: PyTree,
  *sample: PyTree,
  pointwise_channels: int = 4,
  linear_codes: int = 2048,
) -> list[plans.Rule]:
  """Returns the paper's rules with large blocks.

  As `paper_small`, but two channels of a convolution share a sub-vector; in the
  paper's ResNet-50 also eight, not four, of a 1x1 convolution.
  """
  block = _Blocks(2, pointwise_channels, linear_codes)
  return _paper(apply_fn, variables, sample, block)


class _Blocks(NamedTuple):
  """Channels of a sub-vector in convolutions, and codewords of the rest."""

  channels: int
  pointwise_channels: int
  linear_codes: int


def _paper(
  apply_fn: Callable[..., PyTree],
  variables: PyTree,
  sample: tuple[PyTree, ...],
  wanted: _Blocks,
) -> list[plans.Rule]:
  plans.check_rule(
    plans.Rule(".*", wanted.linear_codes, wanted.pointwise_channels)
  )
  kernels = kernel_discovery.find_kernels(apply_fn, variables, *sample)
  first = first_layers.find_first_kernels(apply_fn, variables, sample, kernels)
  flat = trees.flatten(variables)
  return [
    plans.Rule(re.escape(path), None)
    if path in first
    else _rule(path, tuple(flat[path].shape), axes, wanted)
    for path, axes in kernels.items()
  ]


def _rule(
  path: str, shape: tuple[int, ...], axes: blocks.KernelAxes, wanted: _Blocks
) -> plans.Rule:
  taps = set(range(len(shape))).difference(*axes)
  codes = 256 if taps else wanted.linear_codes
  if math.prod(shape[axis] for axis in taps) > 1:
    most = wanted.channels
  else:
    most = wanted.pointwise_channels if taps else _LINEAR_CHANNELS
  channels = max(
    n for n in range(1, most + 1) if shape[axes.inputs[-1]] % n == 0
  )
  spec = blocks.make_spec(channels, axes, len(shape))
  c_out, m, _ = spec.layout(spec.layer_shape(shape))
  fits = c_out * m >= _LEAST_VECTORS
  return plans.Rule(re.escape(path), codes if fits else None, channels)

"""The layout of a kernel's sub-vectors: one spec, and the functions it defines.

Axis letters, here and in the whole project: N sub-vectors of length D, M of
them for each of the C_out output channels, K codewords.
No other module reshapes a kernel.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pqf_jax import errors
from pqf_jax.core import trees

# A codebook [K, D] has no place for stacked layers behind its two axes.
LAST_STACK_AXIS = 2


class KernelAxes(NamedTuple):
  """What the axes of a kernel are for; the axes not named are taps.

  All axes count from 0, in the array as it is in the tree.

  Attributes:
    inputs: axes that the layer sums over; the last is cut into blocks.
    outputs: axes of the layer's outputs.
    stacked: consecutive axes whose indices are layers, or experts, of their
      own.
  """

  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  stacked: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class BlockSpec:
  """Which entries of a kernel share a sub-vector.

  C_in and C_out are the products of the input and output axes, in their order:
  `[features, heads, depth]` has heads * depth output channels. A sub-vector
  holds `channels` consecutive input channels of one output channel, with all
  their kernel taps (the other axes): D = channels * taps, ordered (channel,
  taps). The N = C_out * M sub-vectors are ordered (output channel, block). For
  `[..., in, out]` this is the order of torch's `OIHW.reshape(-1, D)`, so that
  files and sizes agree with the paper's (section 3.2 of arXiv 2010.15703).

  Attributes:
    channels: input channels that share one sub-vector.
    in_axes: the input axes of one layer; the last is cut into blocks.
    out_axes: the output axes of one layer.
    stack_axes: where the whole array has the axes of stacked layers, which are
      consecutive. Each layer has sub-vectors and a codebook of its own.
  """

  channels: int
  in_axes: tuple[int, ...] = (-2,)
  out_axes: tuple[int, ...] = (-1,)
  stack_axes: tuple[int, ...] = ()

  def layout(self, shape: Sequence[int]) -> tuple[int, int, int]:
    """Returns (C_out, M, D) of one layer of this shape.

    Raises:
      InputError: `channels` does not divide the last input axis.
    """
    c_in, c_out = self._sizes(shape)
    blocked = shape[self.in_axes[-1]] if self.in_axes else 1
    if blocked % self.channels:
      divisors = [n for n in range(1, blocked + 1) if blocked % n == 0]
      raise errors.InputError(
        f"a kernel of shape {tuple(shape)} has {blocked} input channels, which "
        f"cannot be divided into sub-vectors of {self.channels} channels; set "
        f"channels to a divisor of {blocked}: {', '.join(map(str, divisors))}"
      )
    taps = math.prod(shape) // (c_in * c_out)
    return c_out, c_in // self.channels, self.channels * taps

  def tap_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the sizes of the taps of one layer, such as (3, 3)."""
    ends = self._ends(len(shape))
    return tuple(n for axis, n in enumerate(shape) if axis not in ends)

  def to_channels(self, kernel: trees.Array) -> Any:
    """Rearranges one layer as [C_out, C_in, taps], input channels apart.

    A layer on the host stays there.
    """
    ends = self._ends(kernel.ndim)
    taps = (axis for axis in range(kernel.ndim) if axis not in ends)
    c_in, c_out = self._sizes(kernel.shape)
    return kernel.transpose(*ends, *taps).reshape(c_out, c_in, -1)

  def to_blocks(self, kernel: trees.Array) -> jax.Array:
    """Cuts one layer into its sub-vectors, [C_out, M, D]."""
    return self.to_channels(kernel).reshape(self.layout(kernel.shape))

  def from_blocks(self, blocks: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Joins sub-vectors [C_out, M, D] to a layer; undoes `to_blocks`."""
    ends = self._ends(len(shape))
    taps = [axis for axis in range(len(shape)) if axis not in ends]
    moved = blocks.reshape([shape[axis] for axis in (*ends, *taps)])
    return jnp.moveaxis(moved, range(len(ends)), ends)

  def stack_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the sizes of the stack axes of a whole array."""
    return tuple(shape[axis] for axis in self.stack_axes)

  def layer_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape of one layer of a whole array."""
    axes = range(len(shape))
    return tuple(shape[axis] for axis in axes if axis not in self.stack_axes)

  def take_layer(self, kernel: trees.Array, index: int) -> trees.Array:
    """Returns one layer of a whole array; those of a stack are in C order."""
    if not self.stack_axes:
      return kernel
    place = np.unravel_index(index, self.stack_shape(kernel.shape))
    return kernel[(slice(None),) * self.stack_axes[0] + tuple(map(int, place))]

  def whole_axes(self, axes: Sequence[int], rank: int) -> tuple[int, ...]:
    """Returns where a whole array of this rank has axes of one layer."""
    kept = [axis for axis in range(rank) if axis not in self.stack_axes]
    return tuple(kept[axis] for axis in axes)

  def _sizes(self, shape: Sequence[int]) -> tuple[int, int]:
    """Returns (C_in, C_out)."""
    c_in = math.prod(shape[axis] for axis in self.in_axes)
    return c_in, math.prod(shape[axis] for axis in self.out_axes)

  def _ends(self, rank: int) -> tuple[int, ...]:
    return tuple(axis % rank for axis in (*self.out_axes, *self.in_axes))


def make_spec(channels: int, axes: KernelAxes, rank: int) -> BlockSpec:
  """Returns the spec of an array of this rank, whose axes are known.

  Axes of a layer count from its end, so that `[..., in, out]` gives the default
  spec, whatever its taps and stacks.
  """
  layer = [axis for axis in range(rank) if axis not in axes.stacked]

  def from_end(whole: Iterable[int]) -> tuple[int, ...]:
    return tuple(layer.index(axis) - len(layer) for axis in whole)

  return BlockSpec(
    channels, from_end(axes.inputs), from_end(axes.outputs), axes.stacked
  )

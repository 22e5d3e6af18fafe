"""The layout of a kernel's sub-vectors: one spec, and the functions it defines.

Axis letters, here and in the whole project: N sub-vectors of length D, M of
them for each of the C_out output channels, K codewords.
No other module reshapes a kernel.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pqf_jax import errors


@dataclasses.dataclass(frozen=True)
class BlockSpec:
  """Which entries of a kernel `[..., in, out]` share a sub-vector.

  A sub-vector holds `channels` consecutive input channels of one output
  channel, with all their kernel taps: D = channels * taps, ordered (channel,
  taps). The N = C_out * M sub-vectors are ordered (output channel, block).
  This is the order of torch's `OIHW.reshape(-1, D)`, so that files and sizes
  agree with the paper's (section 3.2 of arXiv 2010.15703).

  Attributes:
    channels: input channels that share one sub-vector.
    in_axis: the axis cut into blocks of `channels`; the one to permute.
    out_axis: the axis whose indices never share a sub-vector.
  """

  channels: int
  in_axis: int = -2
  out_axis: int = -1

  def layout(self, shape: Sequence[int]) -> tuple[int, int, int]:
    """Returns (C_out, M, D) of a kernel of this shape.

    Raises:
      InputError: the input channels are not divisible by `channels`.
    """
    c_in, c_out = shape[self.in_axis], shape[self.out_axis]
    if c_in % self.channels:
      raise errors.InputError(
        f"a kernel of shape {tuple(shape)} has {c_in} input channels, which "
        f"cannot be divided into sub-vectors of {self.channels} channels; set "
        f"channels to a divisor of {c_in}"
      )
    taps = math.prod(shape) // (c_in * c_out)
    return c_out, c_in // self.channels, self.channels * taps

  def to_channels(self, kernel: jax.Array) -> jax.Array:
    """Rearranges a kernel as [C_out, C_in, taps], input channels apart."""
    moved = jnp.moveaxis(kernel, (self.out_axis, self.in_axis), (0, 1))
    return moved.reshape(moved.shape[:2] + (-1,))

  def to_blocks(self, kernel: jax.Array) -> jax.Array:
    """Cuts a kernel into its sub-vectors, [C_out, M, D]."""
    return self.to_channels(kernel).reshape(self.layout(kernel.shape))

  def from_blocks(self, blocks: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Joins sub-vectors [C_out, M, D] to a kernel; undoes `to_blocks`."""
    rank = len(shape)
    ends = (self.out_axis % rank, self.in_axis % rank)
    taps = [shape[axis] for axis in range(rank) if axis not in ends]
    moved = blocks.reshape([shape[axis] for axis in ends] + taps)
    return jnp.moveaxis(moved, (0, 1), ends)

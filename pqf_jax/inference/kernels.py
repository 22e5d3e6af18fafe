"""`Kernel`: a compressed kernel that a program reads without decoding it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from pqf_jax.core import blocks, trees, vq_array


class Kernel(struct.PyTreeNode):
  """A compressed kernel as the value of a variable, decoded where it is read.

  Attributes:
    codebook: [K, D] float; axes of stacked layers as in a `VQArray`.
    codes: [C_out, M], or [M, C_out] if `by_position`; and the same axes.
    layer_shape: the dense shape of one layer (static).
    spec: the layout of its sub-vectors (static).
    by_position: whether products are made straight from the codes (static).
    then: what the program does to the dense kernel alone, in this order, such
      as a reshape (static).
    dtype: what the program casts the weights to; None: as the codebook is
      (static).
  """

  codebook: trees.Array
  codes: trees.Array
  layer_shape: tuple[int, ...] = struct.field(pytree_node=False)
  spec: blocks.BlockSpec = struct.field(pytree_node=False)
  by_position: bool = struct.field(pytree_node=False, default=False)
  then: tuple[Callable[[jax.Array], jax.Array], ...] = struct.field(
    pytree_node=False, default=()
  )
  dtype: Any = struct.field(pytree_node=False, default=None)

  @property
  def weights(self) -> trees.Array:
    """Returns the codebook, cast."""
    return (
      self.codebook if self.dtype is None else self.codebook.astype(self.dtype)
    )

  @property
  def vq(self) -> vq_array.VQArray:
    """Returns the kernel as it is in the tree, as a `VQArray`."""
    kernel = vq_array.VQArray(
      self.weights, self.codes, self.layer_shape, self.spec
    )
    return _swap_codes(kernel) if self.by_position else kernel

  @property
  def in_axes(self) -> tuple[int, ...]:
    """Returns the input axes of a layer, counted from 0."""
    return tuple(axis % len(self.layer_shape) for axis in self.spec.in_axes)

  @property
  def out_axes(self) -> tuple[int, ...]:
    """Returns the output axes of a layer, counted from 0."""
    return tuple(axis % len(self.layer_shape) for axis in self.spec.out_axes)

  @property
  def is_layer(self) -> bool:
    """Whether it is one layer, as it is in the tree."""
    return self.codebook.ndim == 2 and not self.then

  @property
  def is_matrix(self) -> bool:
    """Whether it is one layer whose axes are all inputs or outputs."""
    num_ends = len(self.in_axes + self.out_axes)
    return self.is_layer and len(self.layer_shape) == num_ends

  @property
  def is_scanned(self) -> bool:
    """Whether the first axis is one of stacked layers, and may be sliced."""
    return 0 in self.vq.stack_axes and not self.then

  def decode(self, others: Sequence[Any] = ()) -> jax.Array:
    """Returns the dense kernel, decoded no earlier than others are computed.

    Compilers would decode the kernels of all layers at once, and so hold all of
    them. XLA's CPU compiler does so in spite of `lax.optimization_barrier`.
    """
    codes = self.codes
    for other in others:
      zero = _zero_after(lax.stop_gradient(other))
      codes = codes + zero.astype(codes.dtype)
    dense = self.replace(codes=codes).vq.decode()
    for change in self.then:
      dense = change(dense)
    return dense

  def astype(self, dtype: Any) -> "Kernel":
    """Returns the kernel with its weights cast, when they are read.

    A product casts them by itself, or else each call would begin with it.
    """
    return self.replace(codebook=self.weights, dtype=jnp.dtype(dtype))

  def transpose(self, permutation: Sequence[int]) -> "Kernel | None":
    """Returns the kernel with its axes permuted, or None if it has to decode.

    It stays codes if it is a matrix, or if only the axes of the stack move, as
    `nn.scan` moves them.
    """
    if self.then:
      return None
    if self.is_matrix:
      return self._transpose_matrix(permutation)
    stacked = self.vq.stack_axes
    places = tuple(permutation.index(axis) for axis in stacked)
    others = [axis for axis in permutation if axis not in stacked]
    if not stacked or others != sorted(others):
      return None
    first, last = places[0], places[-1]
    if places != tuple(range(first, last + 1)):
      return None
    spec = dataclasses.replace(self.spec, stack_axes=places)
    return self.replace(
      codebook=jnp.moveaxis(self.codebook, stacked, places),
      codes=jnp.moveaxis(self.codes, stacked, places),
      spec=spec,
    )

  def _transpose_matrix(self, permutation: Sequence[int]) -> "Kernel":
    spec = dataclasses.replace(
      self.spec,
      in_axes=tuple(permutation.index(axis) for axis in self.in_axes),
      out_axes=tuple(permutation.index(axis) for axis in self.out_axes),
    )
    shape = tuple(self.layer_shape[axis] for axis in permutation)
    return self.replace(layer_shape=shape, spec=spec)


def is_kernel(value: Any) -> TypeGuard[Kernel]:
  """Returns whether a value is a `Kernel`."""
  return isinstance(value, Kernel)


def defer(kernel: vq_array.VQArray) -> Kernel:
  """Returns a kernel that is decoded where it is read."""
  return Kernel(kernel.codebook, kernel.codes, kernel.kernel_shape, kernel.spec)


def arrange(kernel: vq_array.VQArray) -> Kernel:
  """Returns a kernel with its codes by position, if it has no taps."""
  _, _, length = kernel.spec.layout(kernel.kernel_shape)
  if length != kernel.spec.channels:
    return defer(kernel)
  return defer(_swap_codes(kernel)).replace(by_position=True)


def _swap_codes(kernel: vq_array.VQArray) -> vq_array.VQArray:
  """Swaps the axes C_out and M of the codes."""
  stacked = kernel.stack_axes
  axes = [axis for axis in range(kernel.codes.ndim) if axis not in stacked]
  return kernel.replace(codes=jnp.swapaxes(kernel.codes, *axes))


@jax.custom_batching.custom_vmap
def _zero_after(value: jax.Array) -> jax.Array:
  """Returns 0 once a value is computed, which compilers do not foresee."""
  first = value.reshape(-1)[0].astype(jnp.float32)
  bits = lax.bitcast_convert_type(first, jnp.uint32)
  return lax.shift_right_logical(
    lax.shift_right_logical(bits, jnp.uint32(16)), jnp.uint32(16)
  )


@_zero_after.def_vmap
def _zero_after_all(
  axis_size: int, in_batched: list[bool], values: jax.Array
) -> tuple[jax.Array, bool]:
  # One kernel serves all examples of a batch.
  del axis_size, in_batched
  return _zero_after(values), False

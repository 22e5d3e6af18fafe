"""`Kernel`: a compressed kernel that a program reads without decoding it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from flax import struct

from pqf_jax.core import blocks, trees, vq_array
from pqf_jax.inference import order, products


class Kernel(struct.PyTreeNode):
  """A compressed kernel as the value of a variable, decoded where it is read.

  Attributes:
    codebook: [K, D] float; axes of stacked layers as in a `VQArray`.
    codes: [C_out, M], or [N, C_out] if `joined`; and the same axes.
    layer_shape: the dense shape of one layer (static).
    spec: the layout of its sub-vectors (static).
    joined: whether products are made straight from the codes, which then lie as
      `products.join_codes` returns them (static).
    then: what the program does to the dense kernel alone, in this order, such
      as a reshape (static).
    dtype: what the program casts the weights to; None: as the codebook is
      (static).
    dense: what it decodes to, for all that codes do not make faster; None: it
      is decoded where it is read. Axes of stacked layers as in the codebook.
  """

  codebook: trees.Array
  codes: trees.Array
  layer_shape: tuple[int, ...] = struct.field(pytree_node=False)
  spec: blocks.BlockSpec = struct.field(pytree_node=False)
  joined: bool = struct.field(pytree_node=False, default=False)
  then: tuple[Callable[[jax.Array], jax.Array], ...] = struct.field(
    pytree_node=False, default=()
  )
  dtype: Any = struct.field(pytree_node=False, default=None)
  dense: jax.Array | None = None

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
    if not self.joined:
      return kernel
    _, num_positions, _ = self.spec.layout(self.layer_shape)
    axes = _code_axes(kernel)
    num_codes = self.codebook.shape[axes[0]]
    codes = products.split_codes(self.codes, num_codes, num_positions, axes[0])
    return kernel.replace(codes=jnp.swapaxes(codes, *axes))

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
    codes, dense = self.codes, self.dense
    if dense is None:
      for other in others:
        codes = codes + order.zero_after(other, codes).astype(codes.dtype)
      dense = self.replace(codes=codes).vq.decode()
    for change in self.then:
      dense = change(dense)
    return dense

  def astype(self, dtype: Any) -> "Kernel":
    """Returns the kernel with its weights cast, when they are read.

    A product casts them by itself, or else each call would begin with it.
    """
    dense = None if self.dense is None else self.dense.astype(dtype)
    return self.replace(
      codebook=self.weights, dtype=jnp.dtype(dtype), dense=dense
    )

  def transpose(self, permutation: Sequence[int]) -> "Kernel | None":
    """Returns the kernel with its axes permuted, or None if it has to decode.

    It stays codes if it is a matrix, or if only the axes of the stack move, as
    `nn.scan` moves them.
    """
    if self.then:
      return None
    transpose = (
      self._transpose_matrix if self.is_matrix else self._transpose_stack
    )
    moved = transpose(permutation)
    if moved is None or self.dense is None:
      return moved
    return moved.replace(dense=self.dense.transpose(permutation))

  def _transpose_stack(self, permutation: Sequence[int]) -> "Kernel | None":
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
  """Returns a kernel with its codes joined, if it has no taps."""
  _, _, length = kernel.spec.layout(kernel.kernel_shape)
  if length != kernel.spec.channels:
    return defer(kernel)
  axes = _code_axes(kernel)
  num_codes = kernel.codebook.shape[axes[0]]
  codes = jnp.swapaxes(kernel.codes, *axes)
  joined = products.join_codes(codes, num_codes, axes[0])
  return defer(kernel).replace(codes=joined, joined=True)


def _code_axes(kernel: vq_array.VQArray) -> list[int]:
  """Returns the two axes of the codes that are none of stacked layers."""
  return [a for a in range(kernel.codes.ndim) if a not in kernel.stack_axes]

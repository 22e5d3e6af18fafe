"""Recognizes the equations of a program that read kernels, norms and biases."""

import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pqf_jax.calibration import streams
from pqf_jax.core import blocks
from pqf_jax.discovery import tracing

# Equations that hand on the numbers of a variable in their order.
CASTS = frozenset(["convert_element_type", "copy", "copy_p"])


class Read(NamedTuple):
  """An operand of an equation that is a variable, maybe cast or broadcast.

  Attributes:
    path: of the variable.
    operand: the position of the operand.
    axis: for a variable of one axis, the axis of the operand that it lies
      along; None for others.
  """

  path: str
  operand: int
  axis: int | None


class _Source(NamedTuple):
  path: str
  axis: int | None


def find_reads(
  program: streams.Program, paths: Mapping[int, str]
) -> dict[int, Read]:
  """Returns {number of an equation's first result: the variable it reads}.

  Only variables that a single equation reads are listed: others would have to
  suit several layers.

  Args:
    program: the program.
    paths: {number of an argument: path of the variable}.
  """
  ranks = {
    number: len(tracing.shape_of(variable))
    for number, variable in zip(
      program.arguments, program.variables, strict=True
    )
  }
  sources = {
    number: _Source(path, 0 if ranks[number] == 1 else None)
    for number, path in paths.items()
  }
  reads: dict[str, list[tuple[int, Read]]] = {}
  for operation in program.operations:
    for position, atom in enumerate(operation.operands):
      if not isinstance(atom, int) or atom not in sources:
        continue
      source = sources[atom]
      handed_on = _hand_on(operation.eqn, source)
      if handed_on is not None:
        sources[operation.results[0]] = handed_on
      else:
        read = Read(source.path, position, source.axis)
        reads.setdefault(source.path, []).append((operation.results[0], read))
  return {
    found[0][0]: found[0][1] for found in reads.values() if len(found) == 1
  }


def _hand_on(eqn: tracing.Equation, source: _Source) -> _Source | None:
  """Returns what a result is, if it is the same numbers in the same order."""
  name = eqn.primitive.name
  if name in CASTS:
    return source
  if source.axis is None or name not in ("broadcast_in_dim", "reshape"):
    return None
  shape = tracing.shape_of(eqn.outvars[0])
  size = tracing.shape_of(eqn.invars[0])[source.axis]
  if name == "broadcast_in_dim":
    axis = eqn.params["broadcast_dimensions"][source.axis]
    # One number for all channels is no number for each of them.
    return _Source(source.path, axis) if shape[axis] == size else None
  # A reshape that only adds axes of size 1.
  if [length for length in shape if length != 1] == [size]:
    return _Source(source.path, shape.index(size))
  return None


class Product(NamedTuple):
  """A matrix product.

  Attributes:
    contracted: axes of the inputs that are summed over, in the order of the
      kernel's.
  """

  contracted: tuple[int, ...]

  @property
  def groups(self) -> int:
    """Returns 1."""
    return 1

  def input_rows(self, inputs: jax.Array) -> jax.Array:
    """Returns [positions, 1, n]; see `find_layer`."""
    ends = range(-len(self.contracted), 0)
    rows = jnp.moveaxis(inputs, self.contracted, ends)
    return rows.reshape(-1, 1, math.prod(rows.shape[ends[0] :]))


class Convolution(NamedTuple):
  """A convolution; its fields are parameters of `lax.conv_general_dilated`.

  Attributes:
    lhs_spec: axes of the inputs: images, channels, and those of the taps.
    sizes: of the taps.
    window_strides: see there, as of all that follow.
    padding: low and high.
    lhs_dilation: of the inputs.
    rhs_dilation: of the kernel.
    groups: of channels.
  """

  lhs_spec: tuple[int, ...]
  sizes: tuple[int, ...]
  window_strides: tuple[int, ...]
  padding: tuple[tuple[int, int], ...]
  lhs_dilation: tuple[int, ...]
  rhs_dilation: tuple[int, ...]
  groups: int

  def input_rows(self, inputs: jax.Array) -> jax.Array:
    """Returns [positions, G, n]; see `find_layer`."""
    x = jnp.transpose(inputs, self.lhs_spec)  # [images, channels, ...]
    windows = self._windows(x)
    rows = jnp.moveaxis(windows, (1, 2), (-2, -1))
    size = x.shape[1] // self.groups * windows.shape[2]
    return rows.reshape(-1, self.groups, size)

  def _windows(self, x: jax.Array) -> jax.Array:
    """Returns what each tap sees, [images, channels, taps, ...], by slices."""
    padding = [
      (low, high, dilation - 1)
      for (low, high), dilation in zip(
        self.padding, self.lhs_dilation, strict=True
      )
    ]
    zero = jnp.zeros((), x.dtype)
    x = lax.pad(x, zero, [(0, 0, 0), (0, 0, 0), *padding])
    gaps = tuple(zip(self.sizes, self.rhs_dilation, strict=True))
    # Of a tap at 0: the end of what it sees along each axis.
    reach = [
      length - (size - 1) * gap
      for length, (size, gap) in zip(x.shape[2:], gaps, strict=True)
    ]
    offsets = itertools.product(
      *(range(0, size * gap, gap) for size, gap in gaps)
    )
    taps = [
      lax.slice(
        x,
        (0, 0, *starts),
        (*x.shape[:2], *map(sum, zip(starts, reach, strict=True))),
        (1, 1, *self.window_strides),
      )
      for starts in offsets
    ]
    return jnp.stack(taps, 2)


Layer = Product | Convolution


def find_layer(
  eqn: tracing.Equation, operand: int, spec: blocks.BlockSpec
) -> Layer | None:
  """Recognizes a convolution or matrix product.

  Args:
    eqn: an equation that reads a kernel.
    operand: the position of the kernel.
    spec: the layout of the kernel's sub-vectors.

  Returns:
    The layer, hashable. Its `input_rows` makes [positions, G, n] of the other
    operand, with n in the order of a row of sub-vectors (input channels, taps),
    such that the outputs are these rows times the kernel [G, n, O] of each of
    the G groups of the convolution. None: the equation is of another kind, or
    uses the kernel's axes otherwise than the spec.
  """
  shape = tracing.shape_of(eqn.invars[operand])
  sums, outputs = (
    tuple(axis % len(shape) for axis in axes)
    for axes in (spec.in_axes, spec.out_axes)
  )
  params = eqn.params
  if eqn.primitive.name == "dot_general":
    contracted, batch = params["dimension_numbers"]
    of_kernel = tuple(contracted[operand])
    has_taps = len(sums) + len(outputs) != len(shape)
    if any(map(len, batch)) or has_taps or sorted(of_kernel) != sorted(sums):
      return None
    of_inputs = contracted[1 - operand]
    return Product(tuple(of_inputs[of_kernel.index(axis)] for axis in sums))
  if eqn.primitive.name != "conv_general_dilated" or operand != 1:
    return None
  numbers = params["dimension_numbers"]
  of_output, of_input, *taps = numbers.rhs_spec
  is_known = (outputs, sums) == ((of_output,), (of_input,))
  if not is_known or taps != sorted(taps) or params["batch_group_count"] > 1:
    return None
  return Convolution(
    tuple(numbers.lhs_spec),
    tuple(shape[axis] for axis in taps),
    tuple(params["window_strides"]),
    tuple(map(tuple, params["padding"])),
    tuple(params["lhs_dilation"]),
    tuple(params["rhs_dilation"]),
    params["feature_group_count"],
  )

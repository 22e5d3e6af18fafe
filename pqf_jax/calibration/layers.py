"""Recognizes the equations of a program that read kernels, norms and biases."""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pqf_jax.calibration import streams
from pqf_jax.core import blocks
from pqf_jax.discovery import tracing

# Equations that hand on the numbers of a variable in their order.
CASTS = frozenset(["convert_element_type", "copy", "copy_p"])
_MOVES = frozenset(
  ["broadcast_in_dim", "reshape", "slice", "squeeze", "transpose"]
)


class Read(NamedTuple):
  """An operand of an equation that is a variable, or one layer of a stack.

  Attributes:
    path: of the variable.
    operand: the position of the operand.
    dims: the variable's axis along each axis of the operand; None: no axis.
    place: (axis of the variable, entry) for each axis that layers are taken
      along.
  """

  path: str
  operand: int
  dims: tuple[int | None, ...]
  place: tuple[tuple[int, int], ...]

  @property
  def picked(self) -> tuple[Any, ...]:
    """Returns what picks the layer of the variable."""
    taken = dict(self.place)
    axes = range(max(taken, default=-1) + 1)
    return tuple(taken.get(axis, slice(None)) for axis in axes)

  @property
  def form(self) -> tuple[Any, ...]:
    """Returns what is alike where a variable is read alike."""
    return self.operand, self.dims, tuple(axis for axis, _ in self.place)

  @property
  def layer(self) -> str:
    """Returns the name of the layer, such as `path[2]` in a stack."""
    return self.path + "".join(f"[{entry}]" for _, entry in self.place)

  @property
  def axes(self) -> tuple[int, ...]:
    """Returns the operand's axes along which the variable lies, in order."""
    along = [
      (axis, dim) for dim, axis in enumerate(self.dims) if axis is not None
    ]
    return tuple(dim for _, dim in sorted(along))


class _Source(NamedTuple):
  path: str
  dims: tuple[int | None, ...]
  place: tuple[tuple[int, int], ...] = ()


class Reads(NamedTuple):
  """The equations that read variables, as the numbers of their first results.

  Attributes:
    by_result: {equation: what it reads}.
    groups: the equations that read the same variable, or layer of a stack.
  """

  by_result: dict[int, Read]
  groups: tuple[tuple[int, ...], ...]


def find_reads(program: streams.Program, paths: Mapping[int, str]) -> Reads:
  """Finds the equations that read variables.

  A variable that is read in different ways is left out: several layers would
  have to like the same change.

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
    number: _Source(path, tuple(range(ranks[number])))
    for number, path in paths.items()
  }
  reads: dict[str, list[tuple[int, Read]]] = {}
  forms: dict[str, set[tuple[Any, ...]]] = {}
  for operation in program.operations:
    for position, atom in enumerate(operation.operands):
      if not isinstance(atom, int) or atom not in sources:
        continue
      source = sources[atom]
      handed_on = _hand_on(operation.eqn, source)
      if handed_on is not None:
        sources[operation.results[0]] = handed_on
      else:
        read = Read(source.path, position, source.dims, source.place)
        reads.setdefault(source.path, []).append((operation.results[0], read))
        form = operation.eqn.primitive.name, read.form
        forms.setdefault(source.path, set()).add(form)
  by_result: dict[int, Read] = {}
  groups: dict[str, tuple[int, ...]] = {}
  for path, found in reads.items():
    for result, read in found if len(forms[path]) == 1 else ():
      by_result[result] = read
      groups[read.layer] = (*groups.get(read.layer, ()), result)
  return Reads(by_result, tuple(groups.values()))


def _hand_on(eqn: tracing.Equation, source: _Source) -> _Source | None:
  """Returns what a result is, if it has the numbers of one layer, or of all."""
  name, dims = eqn.primitive.name, source.dims
  if name in CASTS:
    return source
  if name not in _MOVES:
    return None
  before, after = (
    tracing.shape_of(atom) for atom in (eqn.invars[0], eqn.outvars[0])
  )
  moved: list[int | None] = [None] * len(after)
  if name == "transpose":
    moved = [dims[dim] for dim in eqn.params["permutation"]]
  elif name == "broadcast_in_dim":
    for dim, out in enumerate(eqn.params["broadcast_dimensions"]):
      moved[out] = dims[dim] if before[dim] == after[out] else None
  elif name == "reshape":  # that only adds or drops axes of size 1
    long = [[d for d, n in enumerate(x) if n != 1] for x in (before, after)]
    if [before[d] for d in long[0]] != [after[d] for d in long[1]]:
      return None
    for dim, out in zip(*long, strict=True):
      moved[out] = dims[dim]
  elif name == "squeeze":
    dropped = [dim % len(dims) for dim in eqn.params["dimensions"]]
    moved = [axis for dim, axis in enumerate(dims) if dim not in dropped]
    firsts = {dims[dim]: 0 for dim in dropped}
    return _placed(source, moved, firsts)
  else:  # a slice of one entry
    starts = eqn.params["start_indices"]
    cut = [d for d, n in enumerate(after) if n != before[d]]
    if any(after[dim] != 1 for dim in cut):
      return None
    moved = [None if d in cut else axis for d, axis in enumerate(dims)]
    return _placed(source, moved, {dims[dim]: starts[dim] for dim in cut})
  return source._replace(dims=tuple(moved))


def _placed(
  source: _Source,
  dims: Sequence[int | None],
  entries: Mapping[int | None, int],
) -> _Source:
  """Returns one layer of a source, at these entries of some axes."""
  place = [(axis, at) for axis, at in entries.items() if axis is not None]
  return _Source(
    source.path, tuple(dims), tuple(sorted((*source.place, *place)))
  )


class Product(NamedTuple):
  """A matrix product.

  Attributes:
    contracted: axes of the inputs that are summed over, in the order of the
      kernel's.
    taps: how many outputs of a channel a position has, as in a transposed
      convolution whose kernels do not overlap.
  """

  contracted: tuple[int, ...]
  taps: int

  @property
  def groups(self) -> int:
    """Returns 1."""
    return 1

  def input_rows(self, inputs: jax.Array) -> jax.Array:
    """Returns [positions, 1, n]; see `find_layer`."""
    ends = range(-len(self.contracted), 0)
    rows = jnp.moveaxis(inputs, self.contracted, ends)
    rows = rows.reshape(-1, 1, math.prod(rows.shape[ends[0] :]), 1)
    # For the outputs of one tap the others multiply zeros.
    one_tap = jnp.eye(self.taps, dtype=rows.dtype)[None, :, None]
    return (rows * one_tap).reshape(-1, 1, rows.shape[2] * self.taps)

  def find_seeing(self, shape: tuple[int, ...]) -> np.ndarray:
    """Returns bool [taps]: all; see `Convolution.find_seeing`."""
    del shape
    return np.ones(self.taps, bool)


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

  def find_seeing(self, shape: tuple[int, ...]) -> np.ndarray:
    """Returns bool [taps], which of them see more than padding.

    Args:
      shape: of the inputs.
    """
    axes = [
      _find_seeing(shape[axis], *along)
      for axis, *along in zip(
        self.lhs_spec[2:],
        self.sizes,
        self.window_strides,
        self.padding,
        self.lhs_dilation,
        self.rhs_dilation,
        strict=True,
      )
    ]
    return functools.reduce(np.multiply.outer, axes, np.ones((), bool)).ravel()

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


def _find_seeing(
  length: int,
  size: int,
  stride: int,
  padding: tuple[int, int],
  dilation: int,
  gap: int,
) -> np.ndarray:
  """Returns bool [size], `Convolution.find_seeing` along one axis."""
  spread = (length - 1) * dilation + 1
  room = sum(padding) + spread - (size - 1) * gap
  windows = np.arange(0, room, stride) - padding[0]
  places = windows + gap * np.arange(size)[:, None]
  is_input = (places >= 0) & (places < spread) & (places % dilation == 0)
  return is_input.any(1)


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
    if any(map(len, batch)) or sorted(of_kernel) != sorted(sums):
      return None
    of_inputs = contracted[1 - operand]
    return Product(
      tuple(of_inputs[of_kernel.index(axis)] for axis in sums),
      math.prod(shape) // math.prod(shape[axis] for axis in (*sums, *outputs)),
    )
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

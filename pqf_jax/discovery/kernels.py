"""Finds the kernels of a network, and what their axes are for, by its program.

A kernel is a variable that a matrix product, a convolution or a lookup reads,
whatever its name: as it is, or after casts, transpositions, reshapes, slices,
and arithmetic with other variables (`nn.WeightNorm`). A contraction tells its
input axes, the rest are outputs or taps; what a loop walks along, an index
picks, or a product treats as a batch is a stack of layers.
"""

import bisect
import collections
import contextlib
import itertools
import math
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core as jax_core

from pqf_jax import errors
from pqf_jax.core import blocks, modules, trees
from pqf_jax.discovery import probes, rules, tracing

PyTree = Any
Equation = tracing.Equation
INPUT, OUTPUT, BATCH = "input", "output", "batch"
_CUTS = """
concatenate dynamic_slice pad rev slice split
"""
_INDEXED = ("dynamic_slice", "gather")


class _View(NamedTuple):
  """How a value shows a variable.

  Attributes:
    path: of the variable.
    shape: of the variable.
    dims: the variable's axes along each axis of the value.
    picked: axes of which an index has picked one entry.
  """

  path: str
  shape: tuple[int, ...]
  dims: tuple[tuple[int, ...], ...]
  picked: frozenset[int] = frozenset()

  def drop(self, dim: int) -> "_View":
    """Returns the view of one entry along an axis of the value."""
    dims = self.dims[:dim] + self.dims[dim + 1 :]
    return self._replace(dims=dims, picked=self.picked | {*self.dims[dim]})


class _Value(NamedTuple):
  """A value of the program.

  Attributes:
    views: the variables that it shows.
    fixed: whether it depends on variables and constants alone.
  """

  views: tuple[_View, ...] = ()
  fixed: bool = True


class _Reading(NamedTuple):
  """What one equation says of the axes of a variable.

  Attributes:
    axes: what they are for.
    picked: how many of them a loop or an index walks along.
    is_product: False for a lookup.
  """

  axes: blocks.KernelAxes
  picked: int
  is_product: bool

  @property
  def weight(self) -> tuple[int, bool]:
    """Returns what decides between readings; the largest is taken."""
    return self.picked, self.is_product


def find_kernels(
  apply_fn: tracing.ApplyFn, variables: PyTree, *inputs: PyTree
) -> dict[str, blocks.KernelAxes]:
  """Returns {path: what its axes are for} of all kernels of a network.

  The function is traced, not run. A kernel has input and output axes, which
  biases and scales have not, and meets data of the inputs; tables are kernels
  wherever rows are looked up, constant places too. Of a kernel that is read
  several times the readings in loops decide, then products before
  lookups, then the first; a warning names those whose readings still disagree.

  Args:
    apply_fn: `apply_fn(variables, *inputs)`, a network in inference mode.
    variables: dense variable tree, maybe of `jax.ShapeDtypeStruct`s.
    *inputs: a small example of the network's inputs, maybe as shapes too.

  Returns:
    The kernels in the order of the tree.

  Raises:
    InputError: the apply function cannot be traced.
  """
  readings = _readings(apply_fn, variables, inputs)
  bare = modules.bare_arrays(variables)
  probed = trees.replace(
    variables,
    {
      path: probes.Probe.of(leaf)
      for path, leaf in trees.flatten(variables).items()
      if readings[path] and path not in bare
    },
  )
  # Where layers take arrays only, no kernel of theirs can be compressed.
  with contextlib.suppress(errors.InputError):
    readings = _readings(apply_fn, probed, inputs)
  found, unclear = {}, []
  for path, seen in readings.items():
    if not seen or path in bare:
      continue
    best = max(seen, key=lambda reading: reading.weight)
    equals = {r.axes for r in seen if r.weight == best.weight}
    found[path] = best.axes
    if len(equals) > 1:
      unclear.append(path)
  if unclear:
    warnings.warn(
      "layers read these kernels along different axes, and the first decides "
      f"about their sub-vectors: {', '.join(unclear)}",
      stacklevel=2,
    )
  return found


def _readings(
  apply_fn: tracing.ApplyFn, variables: PyTree, inputs: tuple[PyTree, ...]
) -> dict[str, list[_Reading]]:
  """Returns {path of each variable: what equations say of its axes}."""
  program = tracing.trace_program(apply_fn, variables, inputs)
  flat = trees.flatten(variables, probes.is_probe)
  walk = _Walk()
  examples = len(tracing.program_body(program).invars) - len(flat)
  walk.run(
    program,
    [
      *(_variable(path, np.shape(leaf)) for path, leaf in flat.items()),
      *[_Value(fixed=False)] * examples,
    ],
  )
  return {path: walk.readings[path] for path in flat}


def _variable(path: str, shape: tuple[int, ...]) -> _Value:
  axes = tuple((axis,) for axis in range(len(shape)))
  return _Value((_View(path, shape, axes),))


class _Walk:
  """One walk over a program; collects {path: readings} of variables."""

  def __init__(self) -> None:
    self.readings: dict[str, list[_Reading]] = collections.defaultdict(list)

  def run(
    self, program: tracing.Jaxpr, operands: Sequence[_Value]
  ) -> list[_Value]:
    """Returns what the results of a program show, given its arguments."""
    body = tracing.program_body(program)
    values: dict[Any, _Value] = dict(zip(body.invars, operands, strict=True))

    def read(atom: Any) -> _Value:
      literal = isinstance(atom, jax_core.Literal)
      return _Value() if literal else values.get(atom, _Value())

    for eqn in body.eqns:
      results = self._apply(eqn, [read(atom) for atom in eqn.invars])
      values.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in body.outvars]

  def _apply(self, eqn: Equation, operands: list[_Value]) -> list[_Value]:
    name = eqn.primitive.name
    called = tracing.called_program(eqn)
    if called is not None:
      return self.run(called, operands)
    if name in ("scan", "while", "cond"):
      return self._control(eqn, operands)
    if name in _READERS:
      self._read(eqn, operands)
    if name in rules.PASS_THROUGH.split():
      return operands
    # Entries of a variable are one, whatever the index depends on.
    sources = operands[:1] if name in _INDEXED else operands
    if name not in _HANDED_ON or not all(source.fixed for source in sources):
      return _unseen(eqn, operands)
    views = tuple(
      handed
      for source in sources
      for view in source.views
      for handed in _HANDED_ON[name](eqn, view)
    )
    return (
      [_Value(views)] * len(eqn.outvars) if views else _unseen(eqn, operands)
    )

  def _control(self, eqn: Equation, operands: list[_Value]) -> list[_Value]:
    """Walks the programs of a loop or a choice."""
    if eqn.primitive.name == "scan":
      return self._loop(eqn, eqn.params["jaxpr"], 0, operands)
    if eqn.primitive.name == "while":
      unread = eqn.params["cond_nconsts"]
      return self._loop(eqn, eqn.params["body_jaxpr"], unread, operands)
    for branch in eqn.params["branches"]:
      self.run(branch, operands[1:])
    return _unseen(eqn, operands)

  def _loop(
    self,
    eqn: Equation,
    program: tracing.Jaxpr,
    unread: int,
    operands: list[_Value],
  ) -> list[_Value]:
    """Walks one step, in which stacked operands lose their first axis."""
    body = tracing.program_body(program)
    atoms, values = eqn.invars[unread:], operands[unread:]
    step = [
      value
      if _rank(atom) == _rank(variable)
      else _Value(tuple(view.drop(0) for view in value.views), value.fixed)
      for atom, variable, value in zip(atoms, body.invars, values, strict=True)
    ]
    # The last of the operands that are not stacked are carried: what a step
    # changes of them is no variable any more.
    whole = [
      i for i, v in enumerate(body.invars) if _rank(atoms[i]) == _rank(v)
    ]
    carried = [
      after
      for atom, after in zip(eqn.outvars, body.outvars, strict=True)
      if _rank(atom) == _rank(after)
    ]
    results = _unseen(eqn, operands)
    first = len(whole) - len(carried)
    for place, (i, after) in enumerate(
      zip(whole[first:], carried, strict=True)
    ):
      if body.invars[i] is after:
        results[place] = values[i]
      else:
        step[i] = _Value(fixed=False)
    self.run(program, step)
    return results

  def _read(self, eqn: Equation, operands: list[_Value]) -> None:
    """Notes what an equation that may read kernels says of their axes."""
    is_product = eqn.primitive.name != "gather"
    if all(operand.fixed for operand in operands) and (
      is_product or _num_rows(eqn) < 2
    ):
      return  # a norm of a kernel, or one layer of a stack
    for operand, roles in zip(
      operands, _READERS[eqn.primitive.name](eqn), strict=True
    ):
      for view in operand.views if roles else ():
        axes = _axes(view, roles)
        if axes is not None:
          reading = _Reading(axes, len(view.picked), is_product)
          self.readings[view.path].append(reading)


def _rank(atom: Any) -> int:
  return len(tracing.shape_of(atom))


def _unseen(eqn: Equation, operands: Sequence[_Value]) -> list[_Value]:
  """Returns results that show no variable."""
  fixed = all(operand.fixed for operand in operands)
  return [_Value(fixed=fixed) for _ in eqn.outvars]


# ---- what equations say of axes ----------------------------------------------


def _axes(view: _View, roles: Sequence[str]) -> blocks.KernelAxes | None:
  """Returns what the axes of a variable are for; None: it is no kernel."""
  given: dict[int, set[str]] = collections.defaultdict(set)
  for dim, role in zip(view.dims, roles, strict=True):
    for axis in dim:
      given[axis].add(role)
  batch = {axis for axis in given if given[axis] == {BATCH}}
  inputs = {axis for axis in given if INPUT in given[axis]}
  outputs = {axis for axis in given if OUTPUT in given[axis]}
  # An axis that was cut up before it was picked from is decoded before that.
  picked = view.picked - inputs - outputs
  stacked = tuple(sorted(picked | batch))
  if not _is_stack(stacked):
    stacked, outputs = tuple(sorted(picked)), outputs | batch
  if not inputs or not outputs or inputs & outputs:
    return None
  return blocks.KernelAxes(
    tuple(sorted(inputs)), tuple(sorted(outputs)), stacked
  )


def _is_stack(axes: tuple[int, ...]) -> bool:
  start, *_ = (*axes, 0)
  run = tuple(range(start, start + len(axes)))
  return axes == run and start <= blocks.LAST_STACK_AXIS


Roles = list[list[str]]
"""The role of each axis of each operand; [] for what is no kernel."""


def _dot_roles(eqn: Equation) -> Roles:
  contracted, batch = eqn.params["dimension_numbers"]
  return [
    [
      INPUT if dim in inner else BATCH if dim in outer else OUTPUT
      for dim in range(_rank(atom))
    ]
    for atom, inner, outer in zip(eqn.invars, contracted, batch, strict=True)
  ]


def _conv_roles(eqn: Equation) -> Roles:
  outputs, inputs, *_ = eqn.params["dimension_numbers"].rhs_spec
  roles = {outputs: OUTPUT, inputs: INPUT}
  dims = range(_rank(eqn.invars[1]))
  return [[], [roles.get(dim, "tap") for dim in dims]]


def _lookup_roles(eqn: Equation) -> Roles:
  """Rows of a table are outputs, and what is taken whole of them the inputs."""
  numbers = eqn.params["dimension_numbers"]
  roles = dict.fromkeys(numbers.start_index_map, OUTPUT)
  roles |= dict.fromkeys(numbers.operand_batching_dims, BATCH)
  dims = range(_rank(eqn.invars[0]))
  return [[roles.get(dim, INPUT) for dim in dims], []]


def _num_rows(eqn: Equation) -> int:
  """Returns how many rows a lookup takes."""
  return math.prod(tracing.shape_of(eqn.invars[1])[:-1])


_READERS: dict[str, Callable[[Equation], Roles]] = {
  "dot_general": _dot_roles,
  "conv_general_dilated": _conv_roles,
  "gather": _lookup_roles,
}


# ---- what hands a variable on ------------------------------------------------

Handed = Sequence[_View]
"""What a result shows of an operand's view: one view, or none."""


def _same(eqn: Equation, view: _View) -> Handed:
  return [view] if len(view.dims) == _rank(eqn.outvars[0]) else []


def _transposed(eqn: Equation, view: _View) -> Handed:
  order = eqn.params["permutation"]
  return [view._replace(dims=tuple(view.dims[dim] for dim in order))]


def _broadcast(eqn: Equation, view: _View) -> Handed:
  dims: list[tuple[int, ...]] = [()] * _rank(eqn.outvars[0])
  for dim, axes in zip(
    eqn.params["broadcast_dimensions"], view.dims, strict=True
  ):
    dims[dim] = axes
  return [view._replace(dims=tuple(dims))]


def _probed(eqn: Equation, view: _View) -> Handed:
  """Marks the axes along which `vmap` runs the layer; they stay."""
  mapped = eqn.params["mapped"]
  picked = {axis for dim in mapped for axis in view.dims[dim]}
  dims = tuple(() if d in mapped else axes for d, axes in enumerate(view.dims))
  return [view._replace(dims=dims, picked=view.picked | picked)]


def _squeezed(eqn: Equation, view: _View) -> Handed:
  return [_without_ones(view, eqn.params["dimensions"])]


def _unstacked(eqn: Equation, view: _View) -> Handed:
  return [view.drop(eqn.params["axis"])]


def _reshaped(eqn: Equation, view: _View) -> Handed:
  """Gives axes that are split or joined all that the run of axes shows."""
  order = eqn.params["dimensions"] or range(len(view.dims))
  view = view._replace(dims=tuple(view.dims[dim] for dim in order))
  before = [tracing.shape_of(eqn.invars[0])[dim] for dim in order]
  after = tracing.shape_of(eqn.outvars[0])
  if 0 in before:
    return []
  ones = [[d for d, n in enumerate(side) if n == 1] for side in (before, after)]
  dims: list[tuple[int, ...]] = [()] * len(after)
  if len(ones[0]) == len(ones[1]):
    for one, other in zip(*ones, strict=True):
      dims[other] = view.dims[one]
    dropped = []
  else:
    dropped = ones[0]
  # The end of each axis in the flat array; axes with ends in common are a run.
  ends = [list(itertools.accumulate(x, operator.mul)) for x in (before, after)]
  common = sorted({*ends[0]} & {*ends[1]})
  runs: dict[int, tuple[int, ...]] = collections.defaultdict(tuple)
  for dim, end in enumerate(ends[0]):
    if before[dim] != 1:
      runs[bisect.bisect_left(common, end)] += view.dims[dim]
  for dim, end in enumerate(ends[1]):
    if after[dim] != 1:
      dims[dim] = runs[bisect.bisect_left(common, end)]
  return [_without_ones(view, dropped)._replace(dims=tuple(dims))]


def _looked_up(eqn: Equation, view: _View) -> Handed:
  """Returns entries of a stack of kernels; a single row is data."""
  numbers = eqn.params["dimension_numbers"]
  gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
  window = [dim for dim in range(len(view.dims)) if dim not in gone]
  if len(window) < 2:
    return []
  dims: list[tuple[int, ...]] = [()] * _rank(eqn.outvars[0])
  for dim, place in zip(window, numbers.offset_dims, strict=True):
    dims[place] = view.dims[dim]
  for dim in sorted(gone, reverse=True):
    view = view.drop(dim)
  return [view._replace(dims=tuple(dims))]


def _without_ones(view: _View, dims: Sequence[int]) -> _View:
  """Drops axes of size 1: of a longer one a slice has picked an entry."""
  for dim in sorted(dims, reverse=True):
    picked = {axis for axis in view.dims[dim] if view.shape[axis] > 1}
    view = view.drop(dim)._replace(picked=view.picked | picked)
  return view


_HANDED_ON: dict[str, Callable[[Equation, _View], Handed]] = {
  **dict.fromkeys(rules.ELEMENTWISE.split(), _same),
  **dict.fromkeys(_CUTS.split(), _same),
  "broadcast_in_dim": _broadcast,
  "gather": _looked_up,
  probes.PRIMITIVE.name: _probed,
  "reshape": _reshaped,
  "squeeze": _squeezed,
  "transpose": _transposed,
  "unstack": _unstacked,
}

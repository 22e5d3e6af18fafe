"""Finds which axes of a network's variables are tied, from its own program.

The apply function is traced, not run; `propagation` reads the trace. So any
Flax network works without a hand-written list of parents and children, as the
paper's configurations have (section 3.1 of arXiv 2010.15703).
"""

import collections
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from pqf_jax.core import channels, trees
from pqf_jax.discovery import axis_factors, propagation, self_check, tracing

PyTree = Any


class _Place(NamedTuple):
  """A place of a group: an axis of a variable, and the factor's place in it."""

  path: str
  dim: int
  outer: int
  inner: int


def discover_channels(
  apply_fn: tracing.ApplyFn, variables: PyTree, *inputs: PyTree
) -> channels.ChannelAxes:
  """Finds the groups of tied axes and checks them by permuting at random.

  Args:
    apply_fn: `apply_fn(variables, *inputs)` gives the outputs whose order must
      not change, and nothing else: a network in inference mode.
    variables: variable tree of arrays, as `apply_fn` takes it; of any library.
    *inputs: a small example of the network's inputs; it is run on them a few
      times, in float64.

  Returns:
    The axes of every group that passes `self_check.check_program`, in the order
    in which the network reads them. See `infer_channels` for the names.

  Raises:
    InputError: the apply function cannot be traced.
  """
  program = tracing.trace_program(apply_fn, variables, inputs)
  axes = _infer(program, variables, inputs)
  return self_check.check_program(
    jax.random.key(0), program, variables, axes, inputs
  )


def infer_channels(
  apply_fn: tracing.ApplyFn, variables: PyTree, *inputs: PyTree
) -> channels.ChannelAxes:
  """Infers the groups of tied axes from the trace alone, without a check.

  A group is a set of two or more variable axes that the program ties to each
  other, and neither to its inputs or outputs nor to anything that depends on
  the order. It is named after the first kernel that the network reads with it,
  which makes the channels: `layer1/0/conv1` for `params/layer1/0/conv1/kernel`;
  where this kernel makes several groups, with the number of the axis, as in
  `attention/query[1]`.

  One axis can carry one group. Where several would fit (groups and channels
  within a group of a GroupNorm, both of which may be permuted), the larger is
  kept.

  The arguments are those of `discover_channels`, but may have
  `jax.ShapeDtypeStruct`s instead of arrays. A warning names the axes that keep
  their order only because the program has primitives without a rule.

  Raises:
    InputError: the apply function cannot be traced.
  """
  program = tracing.trace_program(apply_fn, variables, inputs)
  return _infer(program, variables, inputs)


def _infer(
  program: tracing.Jaxpr, variables: PyTree, inputs: PyTree
) -> channels.ChannelAxes:
  walk = propagation.Propagation()
  parameters = {
    path: axis_factors.new_axes(np.shape(leaf))
    for path, leaf in trees.flatten(variables).items()
  }
  examples = [
    axis_factors.new_axes(np.shape(leaf), "input")
    for leaf in jax.tree.leaves(inputs)
  ]
  for output in walk.run(program, [*parameters.values(), *examples]):
    axis_factors.block_axes(output, "output")

  def first_read(path: str) -> float:
    reads = (
      walk.read_order.get(id(axis), math.inf) for axis in parameters[path]
    )
    return min(reads, default=0)

  ordered = {
    path: parameters[path] for path in sorted(parameters, key=first_read)
  }
  _warn_of_unknown(ordered, walk.unknown)
  return _table(ordered, _groups(ordered))


def _places(
  parameters: Mapping[str, axis_factors.Axes],
) -> Iterator[tuple[axis_factors.Factor, _Place]]:
  for path, axes in parameters.items():
    for dim, axis in enumerate(axes):
      factors = axis_factors.find_factors(axis)
      sizes = [factor.size for factor in factors]
      for position, factor in enumerate(factors):
        outer = math.prod(sizes[:position])
        inner = math.prod(sizes[position + 1 :])
        yield factor, _Place(path, dim, outer, inner)


def _groups(parameters: Mapping[str, axis_factors.Axes]) -> list[list[_Place]]:
  """Lists the places of every free factor that ties two axes or more."""
  places = collections.defaultdict(list)
  for factor, place in _places(parameters):
    if not factor.blocked_by:
      places[factor].append(place)
  tied = [factor for factor in places if len(places[factor]) > 1]
  kept: list[axis_factors.Factor] = []
  taken: set[tuple[str, int]] = set()
  # Only the largest factor is kept where several share an axis.
  for factor in sorted(tied, key=lambda factor: -factor.size):
    occupied = {(place.path, place.dim) for place in places[factor]}
    # An axis of the products of all pairs of channels has the factor twice.
    once = len(occupied) == len(places[factor])
    if once and not occupied & taken:
      kept.append(factor)
      taken |= occupied
  return [places[factor] for factor in tied if factor in kept]


def _table(
  parameters: Mapping[str, axis_factors.Axes], groups: list[list[_Place]]
) -> channels.ChannelAxes:
  """Names the groups, each by its first kernel, and lists their axes."""
  rows: dict[str, list[channels.ChannelAxis | None]] = {
    path: [None] * len(axes) for path, axes in parameters.items()
  }
  founders = [
    next((place for place in group if len(rows[place.path]) > 1), group[0])
    for group in groups
  ]
  for name, group in zip(_names(founders), groups, strict=True):
    for path, dim, outer, inner in group:
      rows[path][dim] = channels.ChannelAxis(name, outer, inner)
  return {path: tuple(row) for path, row in rows.items() if any(row)}


def _names(founders: list[_Place]) -> list[str]:
  """Names every group by its founder, as short as stays unique."""

  def names(place: _Place) -> tuple[str, str, str]:
    module, slash, _ = place.path.removeprefix("params/").rpartition("/")
    module = module if slash else place.path
    return module, f"{module}[{place.dim}]", f"{place.path}[{place.dim}]"

  counts = collections.Counter(
    name for place in founders for name in set(names(place))
  )
  return [
    next((name for name in names(place) if counts[name] == 1), names(place)[-1])
    for place in founders
  ]


def _warn_of_unknown(
  parameters: Mapping[str, axis_factors.Axes], unknown: set[str]
) -> None:
  blocked = [
    (f"{place.path}[{place.dim}]", factor.blocked_by)
    for factor, place in _places(parameters)
    if factor.blocked_by and factor.blocked_by <= unknown
  ]
  if blocked:
    names = dict.fromkeys(name for name, _ in blocked)
    reasons = set().union(*(reasons for _, reasons in blocked))
    warnings.warn(
      "these axes keep their order only because discovery has no rule for the "
      f"primitives {sorted(reasons)}: {', '.join(names)}",
      stacklevel=4,
    )

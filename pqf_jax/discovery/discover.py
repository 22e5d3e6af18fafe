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
from pqf_jax.discovery import (
  axis_factors,
  loops,
  propagation,
  rules,
  self_check,
  tracing,
)

PyTree = Any


# Reasons to keep an order that lie in how the network is written.
_CUTS = {axis_factors.MISFIT, rules.STRIDED}


class _Place(NamedTuple):
  """A place of a group: an axis of a variable, and the factor's place in it.

  The group of `axis` has no name yet.
  """

  path: str
  dim: int
  axis: channels.ChannelAxis


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

  What a layer of a scan keeps to itself, such as its hidden channels, has an
  order of its own in each layer: its axes name the `stacked` ones. What layers
  hand on, or have in common, has one order in all of them.

  One segment of an axis can carry one group: features that the network puts
  side by side (DenseNet, U-Net, Inception), or takes apart, are segments. Where
  several groups would fit (groups and channels within a group of a GroupNorm,
  both of which may be permuted), the larger is kept.

  The arguments are those of `discover_channels`, but may have
  `jax.ShapeDtypeStruct`s instead of arrays. A warning names the axes that keep
  their order only because the program has primitives without a rule; another
  one the kernels that keep theirs only because the network cuts an axis in
  places that do not fit each other.

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
    for leaf in trees.leaves(inputs)
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
  _warn_of_blocked(ordered, walk.unknown)
  own_orders = loops.find_own_orders(walk.seen, walk.walked)
  groups = {
    factor: _stacked(places, ordered, own_orders.get(factor, []))
    for factor, places in _groups(ordered).items()
  }
  return _table(ordered, list(groups.values()))


def _places(
  parameters: Mapping[str, axis_factors.Axes],
) -> Iterator[tuple[axis_factors.Factor, _Place]]:
  for path, axes in parameters.items():
    for dim, axis in enumerate(axes):
      for factor, found in _places_in(axis):
        yield factor, _Place(path, dim, found)


def _places_in(
  axis: axis_factors.Axis, start: int = 0, inner: int = 1
) -> Iterator[tuple[axis_factors.Factor, channels.ChannelAxis]]:
  """Yields the factors of an axis that has `inner` entries for each index."""
  for segment in axis_factors.find_segments(axis):
    sizes = [factor.size for factor in segment]
    stop = start + math.prod(sizes) * inner
    for position, factor in enumerate(segment):
      outer = math.prod(sizes[:position])
      entries = math.prod(sizes[position + 1 :]) * inner
      if factor.terms:  # no major factor: each repetition has all segments
        for first in range(start, stop, factor.size * entries):
          yield from _places_in((factor,), first, entries)
      else:
        yield factor, channels.ChannelAxis("", outer, entries, start, stop)
    start = stop


def _groups(
  parameters: Mapping[str, axis_factors.Axes],
) -> dict[axis_factors.Factor, list[_Place]]:
  """Lists the places of every free factor that ties two axes or more."""
  places = collections.defaultdict(list)
  for factor, place in _places(parameters):
    if not factor.blocked_by:
      places[factor].append(place)
  tied = [
    factor
    for factor, found in places.items()
    if len({place[:2] for place in found}) > 1
  ]
  taken = {
    (path, dim): np.zeros(axis_factors.axis_length(axis), bool)
    for path, axes in parameters.items()
    for dim, axis in enumerate(axes)
  }
  # Only the largest factor is kept where several share a segment.
  by_size = sorted(tied, key=lambda factor: -factor.size)
  kept = {factor for factor in by_size if _take(places[factor], taken)}
  return {factor: places[factor] for factor in tied if factor in kept}


def _stacked(
  places: list[_Place],
  parameters: Mapping[str, axis_factors.Axes],
  own_orders: list[loops.Loop],
) -> list[_Place]:
  """Adds the axes of the layers that have orders of their own."""
  rows: list[list[int]] = [[] for _ in places]
  for loop in own_orders:
    found = [
      [d for d, a in enumerate(parameters[path]) if loops.loop_of(a) == loop]
      for path, _, _ in places
    ]
    # All variables of the group have to be stacks.
    if all(len(dims) == 1 for dims in found):
      rows = [row + dims for row, dims in zip(rows, found, strict=True)]
  return [
    place._replace(axis=place.axis._replace(stacked=tuple(row)))
    for place, row in zip(places, rows, strict=True)
  ]


def _take(
  places: list[_Place], taken: Mapping[tuple[str, int], np.ndarray]
) -> bool:
  """Marks the entries of all places as taken, unless one is taken already.

  An axis of the products of all pairs of channels has a factor twice, so that
  its own places are in each other's way.
  """
  marked: list[np.ndarray] = []
  for path, dim, axis in places:
    entries = taken[path, dim][axis.start : axis.stop]
    if entries.any():
      for entries in marked:
        entries[:] = False
      return False
    entries[:] = True
    marked.append(entries)
  return True


def _table(
  parameters: Mapping[str, axis_factors.Axes], groups: list[list[_Place]]
) -> channels.ChannelAxes:
  """Names the groups, each by its first kernel, and lists their axes."""
  rows: dict[str, list[list[channels.ChannelAxis]]] = {
    path: [[] for _ in axes] for path, axes in parameters.items()
  }
  founders = [
    next((place for place in group if len(rows[place.path]) > 1), group[0])
    for group in groups
  ]
  for name, group in zip(_names(founders), groups, strict=True):
    for path, dim, axis in group:
      rows[path][dim].append(axis._replace(group=name))
  table = {
    path: tuple(
      _joined(found, axis_factors.axis_length(axis))
      for found, axis in zip(row, parameters[path], strict=True)
    )
    for path, row in rows.items()
  }
  return {path: row for path, row in table.items() if any(row)}


def _joined(
  found: list[channels.ChannelAxis], length: int
) -> channels.AxisChannels:
  """Joins segments that follow each other and have the same channels."""
  joined: list[channels.ChannelAxis] = []
  for axis in sorted(found, key=lambda axis: axis.start):
    *before, last = joined or [axis]
    follower = (last.group, last.inner, last.stop)
    if (axis.group, axis.inner, axis.start) == follower:
      axis = axis._replace(outer=last.outer + axis.outer, start=last.start)
      joined = before
    joined = [*joined, axis]
  if [(axis.start, axis.stop) for axis in joined] == [(0, length)]:
    joined = [joined[0]._replace(stop=None)]
  return channels.join_segments(joined)


def _names(founders: list[_Place]) -> list[str]:
  """Names every group by its founder, as short as stays unique."""

  def names(place: _Place) -> tuple[str, ...]:
    path, dim, axis = place
    module, slash, _ = path.removeprefix("params/").rpartition("/")
    module = module if slash else path
    segment = f"[{dim}, {axis.start}:{axis.stop}]"
    return (
      module,
      f"{module}[{dim}]",
      f"{path}[{dim}]",
      module + segment,
      path + segment,
    )

  counts = collections.Counter(
    name for place in founders for name in set(names(place))
  )
  return [
    next((name for name in names(place) if counts[name] == 1), names(place)[-1])
    for place in founders
  ]


def _warn_of_blocked(
  parameters: Mapping[str, axis_factors.Axes], unknown: set[str]
) -> None:
  """Warns of axes that better rules, or another network, would set free."""
  blocked = [
    (place, factor.blocked_by)
    for factor, place in _places(parameters)
    if factor.blocked_by
  ]
  by_unknown = [row for row in blocked if row[1] <= unknown]
  if by_unknown:
    reasons = set().union(*(reasons for _, reasons in by_unknown))
    warnings.warn(
      "these axes keep their order only because discovery has no rule for the "
      f"primitives {sorted(reasons)}: {_listed(by_unknown)}",
      stacklevel=4,
    )
  by_cuts = [
    row
    for row in blocked
    if row[1] <= _CUTS and len(parameters[row[0].path]) > 1
  ]
  if by_cuts:
    warnings.warn(
      "these kernels keep the order of some channels only because the network "
      "cuts an axis in places that do not fit each other, as a strided slice "
      "does, or groups of channels that reach over the parts of a "
      f"concatenation: {_listed(by_cuts)}",
      stacklevel=4,
    )


def _listed(blocked: list[tuple[_Place, set[str]]]) -> str:
  """Lists the axes of places, each once."""
  names = (f"{place.path}[{place.dim}]" for place, _ in blocked)
  return ", ".join(dict.fromkeys(names))

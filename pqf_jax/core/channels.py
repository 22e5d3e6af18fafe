"""Tied axes of the variables, and permuting them together.

Two axes are tied when reordering one without the other would change the
function: the output channels of a layer, its norm, and the input channels of
every layer that reads it (section 3.1 of arXiv 2010.15703).
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pqf_jax import errors
from pqf_jax.core import spread, trees

PyTree = Any


class ChannelAxis(NamedTuple):
  """One segment of an array axis, which carries the channels of a group.

  The segment is [outer, n, inner] flattened, and only n is permuted: flattening
  NHWC features before a dense layer gives outer = H * W, inner = 1. Where
  features lie side by side (concatenation), each have a segment of their own.

  Attributes:
    group: name; axes of one group share one permutation, or one for each layer
      of a stack.
    outer: how many times the channels repeat.
    inner: how many consecutive entries belong to one channel.
    start: first entry of the segment.
    stop: entry after the last one; None: the end of the axis.
    stacked: array axes whose indices are layers with orders of their own; each
      layer is a group then (`groups`).
  """

  group: str
  outer: int = 1
  inner: int = 1
  start: int = 0
  stop: int | None = None
  stacked: tuple[int, ...] = ()

  def groups(
    self, shape: Sequence[int]
  ) -> Iterator[tuple[tuple[int, ...], str]]:
    """Yields (index along the stacked axes, group) of an array's layers.

    An array that has no stacked axes is one layer, whose index is ().
    """
    for index in np.ndindex(*(shape[dim] for dim in self.stacked)):
      layer = ".".join(map(str, index))
      yield index, f"{self.group}, layer {layer}" if index else self.group

  def length(self, axis_length: int) -> int:
    """Returns how many entries the segment has in an axis of this length."""
    stop = axis_length if self.stop is None else self.stop
    return stop - self.start

  def flattened(
    self, before: int, axis_length: int, after: int
  ) -> list["ChannelAxis"]:
    """Returns its segments in [before, axis_length, after] flattened."""
    inner = self.inner * after
    if self.stop is None and not self.start:
      return [self._replace(outer=self.outer * before, inner=inner)]
    starts = range(self.start, before * axis_length, axis_length)
    length = self.length(axis_length)
    return [
      self._replace(
        inner=inner, start=start * after, stop=(start + length) * after
      )
      for start in starts
    ]


AxisChannels = ChannelAxis | tuple[ChannelAxis, ...] | None
"""What one array axis carries: nothing, channels, or several segments."""

ChannelAxes = Mapping[str, tuple[AxisChannels, ...]]
"""{path: what each array axis carries}; a path that is absent is not
permuted."""

Permutations = Mapping[str, np.ndarray]
"""{group: int32 [n]}: new channel i is old channel `permutation[i]`."""


def segments(carried: AxisChannels) -> tuple[ChannelAxis, ...]:
  """Returns the segments of one array axis that carry channels."""
  if carried is None:
    return ()
  return (carried,) if isinstance(carried, ChannelAxis) else carried


def places(axes: ChannelAxes) -> Iterator[tuple[str, int, ChannelAxis]]:
  """Lists (path, number of the axis, segment) of all that carry channels."""
  for path, row in axes.items():
    for dim, carried in enumerate(row):
      for axis in segments(carried):
        yield path, dim, axis


def select(
  axes: ChannelAxes, keep: Callable[[ChannelAxis], bool]
) -> ChannelAxes:
  """Returns the axes with the segments that `keep` accepts, asked in order."""

  def kept(carried: AxisChannels) -> AxisChannels:
    return join_segments(filter(keep, segments(carried)))

  rows = {path: tuple(map(kept, row)) for path, row in axes.items()}
  return {path: row for path, row in rows.items() if any(row)}


def join_segments(found: Iterable[ChannelAxis]) -> AxisChannels:
  """Returns segments as what one array axis carries; undoes `segments`."""
  several = tuple(found)
  return several if len(several) > 1 else next(iter(several), None)


def group_sizes(variables: PyTree, axes: ChannelAxes) -> dict[str, int]:
  """Returns {group: number of channels}, checked over all axes of the group.

  Raises:
    InputError: `axes` names a path that the tree lacks, or gives a variable
      another number of axes than it has, or the axes of one group disagree
      about its size or its layers, or two segments of an axis overlap.
  """
  flat = trees.flatten(variables)
  unknown = axes.keys() - flat.keys()
  if unknown:
    raise errors.InputError(
      f"channel axes name variables that the tree lacks: {sorted(unknown)}; "
      "remove them, or discover the axes on this tree"
    )
  for path, row in axes.items():
    shape = flat[path].shape
    if len(row) != len(shape):
      raise errors.InputError(
        f"{path} has shape {shape} but {len(row)} channel axes; give one "
        "entry (None where nothing is permuted) for each array axis"
      )
    for dim, (carried, length) in enumerate(zip(row, shape, strict=True)):
      _check_apart(f"{path}: axis {dim}", segments(carried), length)
  sizes: dict[str, int] = {}
  stacks: dict[str, list[int]] = {}
  for path, dim, axis in places(axes):
    shape = flat[path].shape
    stack = _stack_sizes(f"{path}: axis {dim}", shape, dim, axis)
    if stack != stacks.setdefault(axis.group, stack):
      raise errors.InputError(
        f"{path}: axis {dim} has orders for a stack of {stack} layers, but "
        f"group {axis.group!r} for one of {stacks[axis.group]}; correct the "
        "stacked axes"
      )
    length = axis.length(shape[dim])
    size, rest = divmod(length, axis.outer * axis.inner)
    expected = size
    for _, name in axis.groups(shape):
      expected = sizes.setdefault(name, size)
    if rest or size != expected:
      raise errors.InputError(
        f"{path}: axis {dim}{_named(axis)} has length {length}, but group "
        f"{axis.group!r} of {expected} channels needs outer * channels * inner "
        f"= {axis.outer} * {expected} * {axis.inner}; correct the axis or its "
        "group"
      )
  return sizes


def _named(axis: ChannelAxis) -> str:
  """Says which segment of an axis is meant, if not all of it."""
  whole = axis.stop is None and not axis.start
  return "" if whole else f": segment {axis.start}:{axis.stop}"


def _stack_sizes(
  name: str, shape: Sequence[int], dim: int, axis: ChannelAxis
) -> list[int]:
  """Returns the sizes of the stacked axes, which are others than the axis."""
  others = {*range(len(shape))} - {dim}
  if len({*axis.stacked} & others) < len(axis.stacked):
    raise errors.InputError(
      f"{name} has the stacked axes {axis.stacked}; of shape {tuple(shape)} "
      f"name different ones among {sorted(others)}"
    )
  return [shape[stacked] for stacked in axis.stacked]


def _check_apart(
  name: str, found: tuple[ChannelAxis, ...], length: int
) -> None:
  """Refuses segments that overlap or leave an axis of this length."""
  end = 0
  for axis in sorted(found, key=lambda axis: axis.start):
    stop = axis.start + axis.length(length)
    if not end <= axis.start <= stop <= length:
      raise errors.InputError(
        f"{name} has length {length}, but the segment {axis.start}:{stop} of "
        f"group {axis.group!r} overlaps another or leaves the axis; correct "
        "its start and stop"
      )
    end = stop


def apply_permutations(
  variables: PyTree,
  axes: ChannelAxes,
  permutations: Permutations,
  *,
  donate: bool = False,
) -> PyTree:
  """Reorders the channels of every group; exact, without arithmetic.

  Groups without a permutation keep their order. If `axes` are the tied axes of
  a network (`discover_channels`), the new variables give the same function.
  Leaves that are spread over devices stay there; `donate` lets their results
  take their memory.

  Raises:
    InputError: see `group_sizes`; or an array is not a permutation of its
      group's channels.
  """
  sizes = group_sizes(variables, axes)
  for group, permutation in permutations.items():
    expected = np.arange(sizes.get(group, 0))
    if not np.array_equal(np.sort(permutation), expected):
      raise errors.InputError(
        f"group {group!r} needs a permutation of {expected.size} channels, "
        f"got {len(permutation)} entries that are no permutation of "
        f"range({expected.size})"
      )
  flat = trees.flatten(variables)
  changed = {}
  for path, row in axes.items():
    leaf = flat[path]
    for dim, carried in enumerate(row):
      alike = collections.defaultdict(list)
      for axis in segments(carried):
        if any(name in permutations for _, name in axis.groups(leaf.shape)):
          alike[axis.stacked].append(axis)
      for moved in alike.values():
        orders = _orders(leaf.shape, dim, moved, permutations)
        own = leaf is not flat[path]
        leaf = spread.take(leaf, orders, dim, donate=donate or own)
    changed[path] = leaf
  return trees.replace(variables, changed)


def _orders(
  shape: Sequence[int],
  dim: int,
  moved: list[ChannelAxis],
  permutations: Permutations,
) -> np.ndarray:
  """Returns which old entry of an axis each new one is, for `spread.take`.

  The segments that move have the same stacked axes.
  """
  stacked = moved[0].stacked
  stack = [shape[axis] for axis in stacked]
  orders = np.tile(np.arange(shape[dim]), (*stack, 1))
  for axis in moved:
    for index, name in axis.groups(shape):
      if name in permutations:
        part = orders[index][axis.start : axis.stop]
        split = part.reshape(axis.outer, len(permutations[name]), axis.inner)
        part[:] = split[:, permutations[name]].reshape(-1)
  if not stacked:
    return orders
  others = {*range(len(shape))} - {*stacked, dim}
  in_place = orders.transpose(np.argsort((*stacked, dim)))
  return np.expand_dims(in_place, sorted(others))

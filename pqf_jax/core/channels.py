"""Tied axes of the variables, and permuting them together.

Two axes are tied when reordering one without the other would change the
function: the output channels of a layer, its norm, and the input channels of
every layer that reads it (section 3.1 of arXiv 2010.15703).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
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
    group: name; axes of one group share one permutation.
    outer: how many times the channels repeat.
    inner: how many consecutive entries belong to one channel.
    start: first entry of the segment.
    stop: entry after the last one; None: the end of the axis.
  """

  group: str
  outer: int = 1
  inner: int = 1
  start: int = 0
  stop: int | None = None

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
      about its size, or two segments of an axis overlap.
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
  for path, dim, axis in places(axes):
    length = axis.length(flat[path].shape[dim])
    size, rest = divmod(length, axis.outer * axis.inner)
    expected = sizes.setdefault(axis.group, size)
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
      moved = [axis for axis in segments(carried) if axis.group in permutations]
      if moved:
        order = _order(leaf.shape[dim], moved, permutations)
        own = leaf is not flat[path]
        leaf = spread.take(leaf, order, dim, donate=donate or own)
    changed[path] = leaf
  return trees.replace(variables, changed)


def _order(
  length: int, moved: list[ChannelAxis], permutations: Permutations
) -> np.ndarray:
  """Returns [length]: which old entry of an axis each new one is."""
  order = np.arange(length)
  for axis in moved:
    permutation = permutations[axis.group]
    part = order[axis.start : axis.stop]
    split = part.reshape(axis.outer, len(permutation), axis.inner)
    part[:] = split[:, permutation].reshape(-1)
  return order

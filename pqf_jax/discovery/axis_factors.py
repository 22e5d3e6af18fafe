"""Axes as products and sums of factors, tied in a union-find.

An axis of an array is an ordered product of factors, major to minor: flattened
features are [height, width, channels]. A factor is split into such a product
where a reshape cuts it, and into a sum, of axes that lie end to end, where a
concatenation or a slice does: the channels of a dense block are [stem + new +
new]. The terms of an axis are called segments.

Tied factors share one permutation; a blocked factor must keep its order. All of
these are lasting facts about the program, so the order in which they are stated
does not matter; except for how much is blocked around cuts that do not fit.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Iterable, Iterator

MISFIT = "cuts of the axis that do not fit each other"


@dataclasses.dataclass(eq=False, slots=True)
class Factor:
  """A node of the union-find.

  Attributes:
    size: how many indices it has; tied factors have the same size.
    blocked_by: reasons why its order is fixed; empty while it is free.
    parts: its product, major to minor, once it is split; or the one factor to
      which it is tied, and which represents both.
    terms: its sum, first to last, once it is cut; nothing else has terms.
  """

  size: int
  blocked_by: set[str] = dataclasses.field(default_factory=set)
  parts: Axis = ()
  terms: tuple[Axis, ...] = ()


Axis = tuple[Factor, ...]
Axes = list[Axis]
"""One `Axis` for each array axis."""


def new_axis(length: int, reason: str = "") -> Axis:
  """Makes a free axis of this length, or a blocked one if given a reason."""
  return (Factor(length, {reason} if reason else set()),)


def new_axes(shape: Iterable[int], reason: str = "") -> Axes:
  """Makes a `new_axis` for every axis of a shape."""
  return [new_axis(length, reason) for length in shape]


def add_axes(terms: Iterable[Axis]) -> Axis:
  """Makes the axis that consists of other axes, end to end."""
  terms = tuple(terms)
  return (Factor(sum(map(axis_length, terms)), terms=terms),)


def axis_length(axis: Axis) -> int:
  """Returns the number of indices of an axis."""
  return math.prod(factor.size for factor in axis)


def find_factors(axis: Axis) -> Axis:
  """Returns the factors whose product is an axis, major to minor.

  They have no parts, but may have terms. Factors of size 1 are left out: they
  have nothing to permute.
  """
  factors = []
  ahead = list(reversed(axis))
  while ahead:
    factor = ahead.pop()
    if factor.parts:
      ahead.extend(reversed(factor.parts))
    elif factor.size != 1:
      factors.append(factor)
  return tuple(factors)


def find_segments(axis: Axis) -> list[Axis]:
  """Lists the axes whose sum is an axis; none of them begins with a sum."""
  segments = []
  ahead = [axis]
  while ahead:
    factors = find_factors(ahead.pop())
    if factors and factors[0].terms:
      terms = filter(axis_length, reversed(factors[0].terms))
      ahead.extend(term + factors[1:] for term in terms)
    else:
      segments.append(factors)
  return segments


def find_leaves(axis: Axis) -> Iterator[Factor]:
  """Yields the factors of an axis that are split no further, in any order."""
  ahead = list(axis)
  while ahead:
    factor = ahead.pop()
    below = [*factor.parts, *itertools.chain.from_iterable(factor.terms)]
    ahead.extend(below)
    if not below:
      yield factor


def block_axes(axes: Iterable[Axis], reason: str) -> None:
  """Fixes the order of these axes."""
  for axis in axes:
    for factor in find_leaves(axis):
      factor.blocked_by.add(reason)


def tie_axes(first: Axis, second: Axis) -> None:
  """Ties two axes of the same length, which then share one permutation.

  Factors are split until both sides agree. Where they cannot, as 6 x 4 and
  8 x 3, or 2 x 4 and 3 + 5, the segments concerned are blocked on both sides.
  """
  sides = [first], [second]
  while axis_length(first) and sides[0]:
    one, other = _aligned_runs(sides)
    if len(one) == len(other) == 1:
      _tie_products(one[0], other[0])
    else:
      fixed = [axis[0].blocked_by for axis in one + other if len(axis) == 1]
      for reason in set().union(*fixed) or {MISFIT}:
        block_axes(one + other, reason)


def tie_all(first: Axes, second: Axes) -> None:
  """Ties two values axis by axis, except axes broadcast from size 1."""
  for one, other in zip(first, second, strict=True):
    if axis_length(one) == axis_length(other):
      tie_axes(one, other)


def drop_axes(axes: Axes, dims: Collection[int]) -> Axes:
  """Returns the axes whose numbers are not in `dims`."""
  return [axis for dim, axis in enumerate(axes) if dim not in dims]


def _aligned_runs(sides: tuple[Axes, Axes]) -> tuple[Axes, Axes]:
  """Takes the shortest runs of segments of equal length off two sums.

  Each side lists its axes, first to last. A run has one segment, unless this
  cannot be cut where a segment of the other side ends.
  """
  runs: tuple[Axes, Axes] = ([], [])
  while True:
    for run, side in zip(runs, sides, strict=True):
      if not run:
        run.append(_take_first(side))
    lengths = [sum(map(axis_length, run)) for run in runs]
    if lengths[0] == lengths[1]:
      return runs
    short = int(lengths[1] < lengths[0])
    long = 1 - short
    if _cut(runs[long][-1], lengths[long] - lengths[short]):
      sides[long].insert(0, runs[long].pop())
    else:
      runs[short].append(_take_first(sides[short]))


def _take_first(axes: Axes) -> Axis:
  """Takes the first segment off a sum of axes."""
  first, *rest = find_segments(axes.pop(0))
  axes[:0] = rest
  return first


def _cut(axis: Axis, surplus: int) -> bool:
  """Cuts entries off the end of a segment, or returns that it cannot.

  What has become several segments by the cut of another, or is no longer than
  the surplus, needs no cut; what is blocked as a whole gets none.
  """
  segment, *others = find_segments(axis)
  at = axis_length(segment) - surplus
  if others or at <= 0:
    return True
  major, *minor = segment
  count, rest = divmod(at, axis_length(tuple(minor)))
  if rest or (major.blocked_by and not minor):  # whose parts would be as fixed
    return False
  sizes = (count, major.size - count)
  major.terms = tuple((Factor(size, set(major.blocked_by)),) for size in sizes)
  return True


def _tie_products(first: Axis, second: Axis) -> None:
  """Ties two segments of the same length, factor by factor."""
  while True:
    one, other = find_factors(first), find_factors(second)
    pairs = list(zip(one, other, strict=False))
    equal = [a.size == b.size and not a.terms + b.terms for a, b in pairs]
    count = equal.index(False) if False in equal else len(pairs)
    if count == len(pairs) or any(factor.terms for factor in pairs[count]):
      break
    small, large = sorted(pairs[count], key=lambda factor: factor.size)
    if large.size % small.size:
      block_axes([first, second], MISFIT)
      return
    sizes = (small.size, large.size // small.size)
    large.parts = tuple(Factor(size, set(large.blocked_by)) for size in sizes)
  for pair in pairs[:count]:
    # An earlier pair of the list may have replaced either of them.
    (kept,), (tied,) = find_factors(pair[:1]), find_factors(pair[1:])
    if kept is not tied:
      tied.parts = (kept,)
      kept.blocked_by |= tied.blocked_by
  if count < len(pairs):
    tie_axes(one[count:], other[count:])

"""Axes as products of factors, tied in a union-find.

An axis of an array is an ordered product of factors, major to minor: flattened
features are [height, width, channels]. Tied factors share one permutation; a
blocked factor must keep its order; a factor that a reshape cuts is split in
two. All three are lasting facts about the program, so the order in which they
are stated does not matter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable


@dataclasses.dataclass(eq=False, slots=True)
class Factor:
  """A node of the union-find.

  Attributes:
    size: how many indices it has; tied factors have the same size.
    blocked_by: reasons why its order is fixed; empty while it is free.
    tied_to: another factor that represents this one.
    parts: (major, minor) once it is split.
  """

  size: int
  blocked_by: set[str] = dataclasses.field(default_factory=set)
  tied_to: Factor | None = None
  parts: tuple[Factor, ...] = ()


Axis = tuple[Factor, ...]
Axes = list[Axis]
"""One `Axis` for each array axis."""


def new_axis(length: int, reason: str = "") -> Axis:
  """Makes a free axis of this length, or a blocked one if given a reason."""
  return (Factor(length, {reason} if reason else set()),)


def new_axes(shape: Iterable[int], reason: str = "") -> Axes:
  """Makes a `new_axis` for every axis of a shape."""
  return [new_axis(length, reason) for length in shape]


def axis_length(axis: Axis) -> int:
  """Returns the number of indices of an axis."""
  return math.prod(factor.size for factor in axis)


def find_factors(axis: Axis) -> list[Factor]:
  """Lists the representatives whose product is an axis, major to minor.

  Factors of size 1 are left out: they have nothing to permute.
  """
  factors = []
  for factor in map(_representative, axis):
    if factor.parts:
      factors += find_factors(factor.parts)
    elif factor.size != 1:
      factors.append(factor)
  return factors


def block_axes(axes: Iterable[Axis], reason: str) -> None:
  """Fixes the order of these axes."""
  for axis in axes:
    for factor in find_factors(axis):
      factor.blocked_by.add(reason)


def tie_axes(first: Axis, second: Axis) -> None:
  """Ties two axes of the same length, which then share one permutation.

  Factors are split until both sides agree; where no common factorization
  exists, such as of 6 x 4 and 8 x 3, both sides are blocked.
  """
  while True:
    pairs = zip(find_factors(first), find_factors(second), strict=False)
    unequal = next((pair for pair in pairs if pair[0].size != pair[1].size), ())
    if not unequal:
      break
    small, large = sorted(unequal, key=lambda factor: factor.size)
    if small.size == 0 or large.size % small.size:
      block_axes([first, second], "incompatible factors")
      return
    sizes = (small.size, large.size // small.size)
    large.parts = tuple(Factor(size, set(large.blocked_by)) for size in sizes)
  pairs = zip(find_factors(first), find_factors(second), strict=True)
  for pair in list(pairs):
    # An earlier pair of the list may have replaced either of them.
    one, other = map(_representative, pair)
    if one is not other:
      other.tied_to = one
      one.blocked_by |= other.blocked_by


def tie_all(first: Axes, second: Axes) -> None:
  """Ties two values axis by axis, except axes broadcast from size 1."""
  for one, other in zip(first, second, strict=True):
    if axis_length(one) == axis_length(other):
      tie_axes(one, other)


def drop_axes(axes: Axes, dims: Collection[int]) -> Axes:
  """Returns the axes whose numbers are not in `dims`."""
  return [axis for dim, axis in enumerate(axes) if dim not in dims]


def _representative(factor: Factor) -> Factor:
  while factor.tied_to is not None:
    factor = factor.tied_to
  return factor

"""Factors whose order may be another one in every step of a loop.

The layers of a scan share a program, not their channels: an order of a layer's
hidden channels needs to hold in this layer only. A value that a step makes is
one of so many: it has the axis that the loop walks, though the program does not
show it. A factor that is found together with this axis in all values may have
an order for each of its indices; one that is found without it, as in the carry,
or in a constant of the loop, has one order for all.
"""

import collections
import itertools
from collections.abc import Iterable
from typing import NamedTuple

from pqf_jax.discovery import axis_factors

Loop = tuple[axis_factors.Axis, ...]
"""The segments of the axis that a loop walks."""


class Seen(NamedTuple):
  """Axes that are found together.

  Attributes:
    axes: of a value, or one of them alone where an equation may mix the indices
      of the others.
    walked: axes that the loops around it walk, outer loops first.
  """

  axes: axis_factors.Axes
  walked: tuple[axis_factors.Axis, ...]


def loop_of(axis: axis_factors.Axis) -> Loop:
  """Returns what is equal for axes of the same indices in the same order."""
  return tuple(axis_factors.find_segments(axis))


def find_own_orders(
  seen: Iterable[Seen], walked: Iterable[axis_factors.Axis]
) -> dict[axis_factors.Factor, list[Loop]]:
  """Finds the loops in whose steps each factor may have an order of its own.

  Call it when the walk has ended, since ties join factors until then.

  Args:
    seen: everything that the program computes with.
    walked: the axes that its loops walk.
  """
  loops = {
    loop_of(axis): set(_leaves([axis]))
    for axis in walked
    if axis_factors.axis_length(axis) > 1
  }
  own: dict[axis_factors.Factor, list[Loop]] = {}
  for axes, around in seen if loops else ():
    counts = collections.Counter(_leaves([*axes, *around]))
    # Where an axis is there twice, either index might be the layer's.
    near = [loop for loop in loops if all(counts[f] == 1 for f in loops[loop])]
    for factor in counts:
      own[factor] = [loop for loop in own.get(factor, near) if loop in near]
  return own


def _leaves(
  axes: Iterable[axis_factors.Axis],
) -> Iterable[axis_factors.Factor]:
  """Lists the factors that have indices to tell apart."""
  found = map(axis_factors.find_leaves, axes)
  leaves = itertools.chain.from_iterable(found)
  return [factor for factor in leaves if factor.size != 1]

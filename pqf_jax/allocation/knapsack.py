"""Picks one choice of each item, so that together they lose least."""

from collections.abc import Sequence

import numpy as np

# Bytes are counted in units of this share of all items at their largest, and
# whole bytes where these are larger. The same for every budget, so that a
# larger one never picks worse.
_UNITS = 1 << 19


def pick_least_loss(
  sizes: Sequence[np.ndarray], losses: Sequence[np.ndarray], budget: int
) -> list[int]:
  """Returns a choice of each item, of least loss within the budget.

  Optimal up to the units of size, see above, to which sizes are rounded up.

  Args:
    sizes: bytes of the choices of each item.
    losses: their losses, alike.
    budget: bytes of all that are picked; enough for the smallest of each item.

  Returns:
    The index of the choice of each item.
  """
  spare = budget - sum(int(size.min()) for size in sizes)
  assert spare >= 0
  unit = max(1, sum(int(size.max()) for size in sizes) // _UNITS)
  costs = [-(-(size - size.min()) // unit) for size in sizes]
  room = min(spare // unit, sum(int(cost.max()) for cost in costs))
  # Least loss of the items so far, within 0, 1, ... units.
  least = np.zeros(room + 1)
  picks = []
  for cost, loss in zip(costs, losses, strict=True):
    total, pick = np.full(room + 1, np.inf), np.zeros(room + 1, np.int16)
    for choice in _undominated(cost, loss):
      units = int(cost[choice])
      if units <= room:
        with_choice = least[: room + 1 - units] + loss[choice]
        better = with_choice < total[units:]
        np.copyto(total[units:], with_choice, where=better)
        np.copyto(pick[units:], choice, where=better)
    least = total
    picks.append(pick)
  chosen = []
  for cost, pick in zip(costs[::-1], picks[::-1], strict=True):
    chosen.append(int(pick[room]))
    room -= int(cost[chosen[-1]])
  return chosen[::-1]


def _undominated(cost: np.ndarray, loss: np.ndarray) -> list[int]:
  """Lists the choices with no other that costs no more and loses no more."""
  kept: list[int] = []
  for choice in np.lexsort((loss, cost)):
    if not kept or loss[choice] < loss[kept[-1]]:
      kept.append(int(choice))
  return kept

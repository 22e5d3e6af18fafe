"""Orders improved by swapping two channels, exactly evaluated.

`swap_round` looks at all pairs at once; `stochastic_swaps` is the authors'
search (section 3.2 of arXiv 2010.15703), kept for comparison.
"""

from typing import NamedTuple

import numpy as np

from pqf_jax.permutation import covariance, objective

# Pairs that a round evaluates exactly, for each channel: 4 find nothing better.
_PAIRS_PER_CHANNEL = 2
_FEWEST_PAIRS = 64
# Random swaps evaluated together; one of 15 to 60 is accepted.
_SPECULATION = 32


class SwapTrace(NamedTuple):
  """What a sequence of random swaps did.

  Attributes:
    permutation: [C], after the last swap.
    accepted: [P] bool, which of the swaps were kept.
    log_det: of the kernel, after the last swap.
  """

  permutation: np.ndarray
  accepted: np.ndarray
  log_det: float


def swap_round(
  grams: objective.Grams, order: objective.Order
) -> objective.Order:
  """Applies the swaps that lower F and share no block, the best first.

  The bound of `orders.placement_scores` is known for all pairs of positions
  from one table; the pairs with the least bounds are evaluated exactly. Groups
  of up to 11 channels have no other pairs.

  Args:
    grams: of the kernels that read the group.
    order: where to start.

  Returns:
    An order that is no worse.
  """
  size = len(order.permutation)
  table = objective.placement_scores(grams, order, np.arange(size))
  at_home = table[order.permutation]
  home = at_home.diagonal()
  bound = at_home + at_home.T - home[:, None] - home[None, :]
  pairs = np.stack(np.triu_indices(size, 1), axis=1)
  count = min(max(_PAIRS_PER_CHANNEL * size, _FEWEST_PAIRS), len(pairs))
  promising = np.argpartition(bound[pairs[:, 0], pairs[:, 1]], count - 1)
  return _apply_disjoint(grams, order, pairs[promising[:count]])


def stochastic_swaps(
  gram: covariance.ChannelGram, permutation: np.ndarray, pairs: np.ndarray
) -> SwapTrace:
  """Tries swaps in turn; each is kept iff it lowers the log-determinant.

  Args:
    gram: of the one kernel that is looked at.
    permutation: [C], where to start.
    pairs: [P, 2] positions to swap.

  Returns:
    What came of it.
  """
  permutation = permutation.copy()
  accepted = np.zeros(len(pairs), bool)
  sums = covariance.moments(gram, permutation)
  best = float(covariance.log_det(gram, sums))
  start = 0
  # Most swaps are refused, so the next ones are evaluated as if all were; what
  # follows the first that is kept is evaluated again.
  while start < len(pairs):
    ahead = pairs[start : start + _SPECULATION]
    change = covariance.swap_moments(gram, permutation, ahead)
    values = covariance.log_det(gram, covariance.add(sums, change))
    better = np.flatnonzero(values < best)
    if not better.size:
      start += len(ahead)
      continue
    row = better[0]
    best = float(values[row])
    sums = covariance.add(sums, change.at(row))
    permutation[ahead[row]] = permutation[ahead[row, ::-1]]
    accepted[start + row] = True
    start += row + 1
  return SwapTrace(permutation, accepted, best)


def random_swaps(
  rng: np.random.Generator,
  grams: objective.Grams,
  permutation: np.ndarray,
  num_swaps: int,
) -> objective.Order:
  """The authors' search: random swaps, judged by the first kernel alone.

  Args:
    rng: random number generator, consumed.
    grams: of the kernels that read the group; the first one decides.
    permutation: [C], where to start.
    num_swaps: how many are tried; the authors try 10,000.
  """
  pairs = rng.integers(len(permutation), size=(num_swaps, 2))
  trace = stochastic_swaps(grams[0], permutation, pairs)
  return objective.evaluate(grams, trace.permutation)


def _apply_disjoint(
  grams: objective.Grams, order: objective.Order, pairs: np.ndarray
) -> objective.Order:
  """Applies swaps one after the other, best first, where F still falls."""
  changes = [
    covariance.swap_moments(gram, order.permutation, pairs) for gram in grams
  ]
  alone = objective.objective(
    grams, [covariance.add(*s) for s in zip(order.sums, changes, strict=True)]
  )
  # The changes hold for `order`: a second swap in a block awaits a new round.
  blocks = pairs // objective.superblock(grams)
  touched: set[int] = set()
  permutation, sums, value = order.permutation.copy(), order.sums, order.log_det
  ranked = np.argsort(alone, kind="stable")
  for row in ranked[alone[ranked] < value - objective.MIN_GAIN]:
    if touched.intersection(blocks[row].tolist()):
      continue
    trial = tuple(
      covariance.add(old, new.at(row))
      for old, new in zip(sums, changes, strict=True)
    )
    found = float(objective.objective(grams, trial))
    if found < value - objective.MIN_GAIN:
      sums, value = trial, found
      touched.update(blocks[row].tolist())
      permutation[pairs[row]] = permutation[pairs[row, ::-1]]
  return objective.evaluate(grams, permutation)

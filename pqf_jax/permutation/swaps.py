"""Swaps of two channels, evaluated exactly, that improve an order.

`swap_round` ranks all pairs at once; `stochastic_swaps` is the authors' search
(section 3.2 of arXiv 2010.15703), kept for comparison.
"""

import numpy as np

from pqf_jax.permutation import covariance, objective

# Pairs that a round evaluates exactly, for each channel: 4 gain nothing more.
_PAIRS_PER_CHANNEL = 2
_FEWEST_PAIRS = 64
# Random swaps evaluated together; one of 15 to 60 is accepted.
_SPECULATION = 32


def swap_round(
  grams: objective.Grams, order: objective.ScoredOrder
) -> objective.ScoredOrder:
  """Applies the swaps that lower F and share no block, the best first.

  One table gives the bound of `objective.placement_scores` for all pairs of
  positions; the pairs with the least bounds are evaluated exactly. Groups of up
  to 11 channels have no other pairs.
  """
  size = len(order.permutation)
  table = objective.placement_scores(grams, order, np.arange(size))
  # [i, j]: the channel of position i, at position j.
  moved = table[order.permutation]
  stay = moved.diagonal()
  bound = moved + moved.T - stay[:, None] - stay[None, :]
  pairs = np.stack(np.triu_indices(size, 1), axis=1)
  count = min(max(_PAIRS_PER_CHANNEL * size, _FEWEST_PAIRS), len(pairs))
  promising = np.argpartition(bound[pairs[:, 0], pairs[:, 1]], count - 1)
  return _apply_disjoint(grams, order, pairs[promising[:count]])


def stochastic_swaps(
  grams: objective.Grams, permutation: np.ndarray, pairs: np.ndarray
) -> objective.ScoredOrder:
  """Tries to swap `pairs` [P, 2] of positions of a permutation [C], in turn.

  A swap is kept if it lowers the log-determinant of the first kernel.
  """
  gram, permutation = grams[0], permutation.copy()
  moments = covariance.order_moments(gram, permutation)
  best = covariance.log_det(gram, moments)
  start = 0
  # Most swaps are refused, so the next ones are evaluated as if all were; those
  # after the first one that is kept are evaluated again.
  while start < len(pairs):
    ahead = pairs[start : start + _SPECULATION]
    change = covariance.swap_moments(gram, permutation, ahead)
    values = covariance.log_det(gram, covariance.add(moments, change))
    better = np.flatnonzero(values < best)
    if not better.size:
      start += len(ahead)
      continue
    row = better[0]
    best = values[row]
    moments = covariance.add(moments, change.at(row))
    permutation[ahead[row]] = permutation[ahead[row, ::-1]]
    start += row + 1
  return objective.evaluate(grams, permutation)


def _apply_disjoint(
  grams: objective.Grams, order: objective.ScoredOrder, pairs: np.ndarray
) -> objective.ScoredOrder:
  """Applies swaps one after the other, best first, while F falls."""
  changes = [
    covariance.swap_moments(gram, order.permutation, pairs) for gram in grams
  ]
  alone = objective.mean_log_det(
    grams,
    [covariance.add(*m) for m in zip(order.moments, changes, strict=True)],
  )
  # The changes hold for `order`: a second swap in a block awaits a new round.
  blocks = pairs // objective.superblock(grams)
  touched: set[int] = set()
  permutation = order.permutation.copy()
  moments, value = order.moments, order.log_det
  ranked = np.argsort(alone, kind="stable")
  for row in ranked[alone[ranked] < value - objective.MIN_GAIN]:
    if touched.intersection(blocks[row].tolist()):
      continue
    trial = tuple(
      covariance.add(old, new.at(row))
      for old, new in zip(moments, changes, strict=True)
    )
    trial_value = float(objective.mean_log_det(grams, trial))
    if trial_value < value - objective.MIN_GAIN:
      moments, value = trial, trial_value
      touched.update(blocks[row].tolist())
      permutation[pairs[row]] = permutation[pairs[row, ::-1]]
  return objective.evaluate(grams, permutation)

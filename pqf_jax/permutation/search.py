"""The search for a channel order of small sub-vector log-determinant.

Section 3.2 of arXiv 2010.15703 sorts the channels and then tries random swaps.
This search minimizes the F of `objective` in four steps:

1. **Sorted start.** Each slot of the sub-vectors takes the channels of one rank
   range of the channels' own log-determinants: F is at most the sum of the
   slots' own log-determinants (Hadamard), which sorting makes small.
2. **Assignment.** Take one channel out of each block. The linear bound of
   `objective.placement_scores` says what each of them costs in each hole, and a
   linear assignment problem finds the best of all ways to fill the holes. This
   is majorize-minimize: F cannot rise. First the holes are one slot of all
   blocks; then each block's slot is drawn at random, which also moves channels
   between slots.
3. **Aligned start.** In the sorted order the slots hardly correlate, and the
   first assignment would amplify the noise of M. The inverse of a made-up
   covariance, in which all slots correlate equally in every tap, leads it to an
   order whose slots agree. On real weights the orders in which slots agree are
   better by up to 1.5 nats than those in which they oppose each other.
4. **Swaps** of two channels (`swaps.swap_round`), evaluated exactly, without
   the linear bound.
"""

import numpy as np
from scipy import optimize

from pqf_jax.permutation import covariance, objective, swaps

# Correlation of the made-up covariance.
_ALIGNED_CORRELATION = 0.5
# Passes over the slots after a start; the gains end after 2 to 4.
_NUM_PASSES = 4
_ASSIGNMENTS_PER_ROUND = 4
# Channels moved at random to leave a local optimum, at most.
_MOST_MOVED = 16


def search_permutation(
  rng: np.random.Generator,
  grams: objective.Grams,
  *,
  num_starts: int = 2,
  num_rounds: int = 4,
) -> objective.ScoredOrder:
  """Searches by sorting, assignments and swaps (see the module docstring).

  Args:
    rng: random number generator, consumed.
    grams: of the kernels that read the group's channels; with a ridge, unless
      all orders have regular covariances.
    num_starts: sorted starts, in turn aligned and not; the third and later ones
      are shuffled within their slots. The best after its assignments goes on.
    num_rounds: rounds of random assignments and swaps that follow. A round
      without a gain is followed by one that starts from the best order with a
      few channels moved.

  Groups of 128 channels or less have poorer optima and cheaper rounds: they get
  256 / C times as many starts and rounds, 16 times at most.

  Returns:
    The best order of the search, which may be worse than the present one.
  """
  permutation = sorted_permutation(grams)
  blocks = permutation.reshape(-1, objective.superblock(grams))
  repeats = min(16, max(1, 256 // len(permutation)))
  starts = []
  for number in range(num_starts * repeats):
    if number >= 2:
      permutation = rng.permuted(blocks, axis=0).reshape(-1)
    order = objective.evaluate(grams, permutation)
    if number % 2 == 0:
      order = align_slots(grams, order)
    starts.append(assign_slots(grams, order))
  best = trial = min(starts, key=lambda start: start.log_det)
  for _ in range(num_rounds * repeats):
    after = assign_random(rng, grams, trial, _ASSIGNMENTS_PER_ROUND)
    after = swaps.swap_round(grams, after)
    stalled = after.log_det > trial.log_det - objective.MIN_GAIN
    best = _better(best, after)
    trial = _kick(rng, grams, best) if stalled else after
  return best


def search_like_authors(
  rng: np.random.Generator, grams: objective.Grams, *, num_swaps: int = 10_000
) -> objective.ScoredOrder:
  """Sorts and swaps at random, both judged by the first kernel alone.

  The authors try 10,000 swaps.
  """
  start = sorted_permutation(grams[:1])
  pairs = rng.integers(len(start), size=(num_swaps, 2))
  return swaps.stochastic_swaps(grams, start, pairs)


def keep_order(
  rng: np.random.Generator, grams: objective.Grams
) -> objective.ScoredOrder:
  """Scores the present order, without a search, for comparison."""
  del rng
  return objective.evaluate(grams, np.arange(len(grams[0].sums)))


def sorted_permutation(grams: objective.Grams) -> np.ndarray:
  """Fills slot by slot with channels of falling log-determinant.

  A channel's log-determinant is that of its taps' covariance over the rows of a
  kernel. Kernels of 2 and of 8 slots are both served: the positions of a
  superblock are filled by their slot among 2 first, and by that among 8 next.
  """
  log_dets = sum(
    share * _channel_log_dets(gram)
    for share, gram in zip(objective.shares(grams), grams, strict=True)
  )
  ranked = np.argsort(-log_dets, kind="stable")
  slots = objective.superblock(grams)
  position = np.arange(slots)
  sizes = sorted({gram.slots for gram in grams}, reverse=True)
  filled = np.lexsort([position % size for size in sizes])
  permutation = np.empty((len(ranked) // slots, slots), np.intp)
  permutation[:, filled] = ranked.reshape(slots, -1).T
  return permutation.reshape(-1)


def align_slots(
  grams: objective.Grams, order: objective.ScoredOrder
) -> objective.ScoredOrder:
  """Makes all slots agree by one pass of assignments; F may rise."""
  for holes in _slot_holes(grams, order):
    order = _assign(grams, order, holes, _aligned)
  return order


def assign_slots(
  grams: objective.Grams, order: objective.ScoredOrder
) -> objective.ScoredOrder:
  """Improves an order by assignments, slot by slot of all superblocks."""
  for _ in range(_NUM_PASSES):
    before = order.log_det
    for holes in _slot_holes(grams, order):
      order = _better(order, _assign(grams, order, holes))
    if order.log_det > before - 1e-3:
      break
  return order


def assign_random(
  rng: np.random.Generator,
  grams: objective.Grams,
  order: objective.ScoredOrder,
  num_assignments: int,
) -> objective.ScoredOrder:
  """Improves an order by assignments of a random slot of every block.

  The blocks are those of a random kernel. Holes of small blocks may share a
  block of another kernel, where the bound does not hold; so an order is taken
  only if it is better.
  """
  for _ in range(num_assignments):
    slots = grams[int(rng.integers(len(grams)))].slots
    first = np.arange(0, len(order.permutation), slots)
    holes = first + rng.integers(slots, size=len(first))
    order = _better(order, _assign(grams, order, holes))
  return order


def _slot_holes(
  grams: objective.Grams, order: objective.ScoredOrder
) -> list[np.ndarray]:
  """Lists, for each slot of the superblock, its positions in all of them."""
  slots = objective.superblock(grams)
  return list(np.arange(len(order.permutation)).reshape(-1, slots).T)


def _better(
  order: objective.ScoredOrder, other: objective.ScoredOrder
) -> objective.ScoredOrder:
  """Returns the other order where it is better by more than rounding."""
  return other if other.log_det < order.log_det - objective.MIN_GAIN else order


def _assign(
  grams: objective.Grams,
  order: objective.ScoredOrder,
  holes: np.ndarray,
  model: objective.CovarianceModel = objective.measured,
) -> objective.ScoredOrder:
  """Fills the holes with their own channels at the least sum of scores."""
  channels = order.permutation[holes]
  scores = objective.placement_scores(grams, order, holes, model)
  taken, hole = optimize.linear_sum_assignment(scores[channels])
  permutation = order.permutation.copy()
  permutation[holes[hole]] = channels[taken]
  return objective.evaluate(grams, permutation)


def _kick(
  rng: np.random.Generator, grams: objective.Grams, order: objective.ScoredOrder
) -> objective.ScoredOrder:
  """Reorders a few random channels, to leave a local optimum."""
  size = len(order.permutation)
  number = rng.integers(2, max(2, min(size, _MOST_MOVED)) + 1)
  moved = rng.choice(size, size=number, replace=False)
  permutation = order.permutation.copy()
  permutation[moved] = permutation[rng.permutation(moved)]
  return objective.evaluate(grams, permutation)


def _aligned(matrix: np.ndarray, slots: int) -> np.ndarray:
  """Replaces the correlations between slots by equal ones in every tap."""
  taps = len(matrix) // slots
  blocks = matrix.reshape(slots, taps, slots, taps)
  each = np.arange(slots)
  within = blocks[each, :, each]
  roots = np.linalg.cholesky(within)
  aligned = _ALIGNED_CORRELATION * np.einsum("ats,cus->atcu", roots, roots)
  aligned[each, :, each] = within
  return aligned.reshape(matrix.shape)


def _channel_log_dets(gram: covariance.ChannelGram) -> np.ndarray:
  """Returns [C], log-determinants of the covariance of each channel's taps."""
  num_channels = len(gram.sums)
  rows = gram.num_subvectors * gram.slots // num_channels
  single = gram._replace(slots=1, num_subvectors=rows)
  each = np.arange(num_channels)
  moments = covariance.Moments(gram.products[each, each], gram.sums)
  return covariance.log_det(single, moments)

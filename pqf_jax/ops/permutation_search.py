"""The search for a channel order of small sub-vector log-determinant.

Minimizes F(order) = sum_k share_k * log det cov_k(order) over the orders of one
channel group, where k runs over the kernels that read it and share_k is the
share of kernel k in all of their sub-vectors. Section 3.2 of arXiv 2010.15703
sorts the channels and then tries random swaps for one kernel; here:

1. **Sorted start.** Slot a of every sub-vector takes the channels of one rank
   range of the channels' own log-determinants. Unequal slots have a small
   product of variances (Hadamard's bound), and sorting minimizes it.
2. **Assignment.** log det is concave, so that with M the inverse covariance
   log det(S + dS) <= log det S + tr(M dS). Take one channel out of each block:
   the right side is then linear in who fills which hole, and a linear
   assignment problem finds the best of all orders of the holes at once. This is
   majorize-minimize: it never increases F. Holes of one slot first, then slots
   drawn at random, block by block, which also moves channels between slots.
3. **Aligned start.** In the sorted order the slots hardly correlate, and the
   first assignment amplifies whatever noise M has. M of a made-up covariance, in
   which every two slots correlate equally in all taps, leads it to an order
   whose slots agree; the orders in which they oppose are worse optima.
4. **Swaps.** The bound above is known for all pairs of positions from one table
   of (channel, position); the most promising pairs are evaluated exactly, and
   those that lower F and share no block are applied, best first.

Host float64 NumPy throughout (see `covariance`); the same seed gives the same
order on the same machine.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize

from pqf_jax.ops import covariance

# A smaller gain is rounding.
_MIN_GAIN = 1e-9
# Correlation of the made-up covariance of the aligned start. 0.3 to 0.8 end
# alike.
_ALIGNED_CORRELATION = 0.5
# Pairs evaluated exactly in one round of swaps, per channel.
_PAIRS_PER_CHANNEL = 4


MODE = True


class Order(NamedTuple):
  """One order of a group's channels and what it is worth.

  Attributes:
    permutation: [C] int; new channel i is old channel `permutation[i]`.
    sums: the moments of every kernel in this order.
    log_det: F, the weighted mean of the kernels' log-determinants.
  """

  permutation: np.ndarray
  sums: tuple[covariance.Moments, ...]
  log_det: float


Grams = Sequence[covariance.ChannelGram]


def evaluate(grams: Grams, permutation: np.ndarray) -> Order:
  """The order of this permutation, with its objective F.

  Args:
    grams: one for each kernel that reads the group's channels.
    permutation: [C].
  """
  sums = tuple(covariance.moments(gram, permutation) for gram in grams)
  return Order(permutation, sums, float(_objective(grams, sums)))


def search_permutation(
  rng: np.random.Generator,
  grams: Grams,
  *,
  num_starts: int = 4,
  num_assignments: int = 24,
  num_swap_rounds: int = 20,
) -> Order:
  """Searches by sorting, assignments and swaps (see the module docstring).

  Args:
    rng: random number generator, consumed.
    grams: one for each kernel that reads the group's channels.
    num_starts: starts that are carried through the first assignments; the best
      of them goes on.
    num_assignments: assignment problems with holes in random slots.
    num_swap_rounds: rounds of swaps at most; fewer where none helps any more.

  Returns:
    The best order found. It may be worse than the order that was given.
  """
  slots = superblock(grams)
  first = sorted_permutation(grams)
  best = None
  for start in range(num_starts):
    permutation = first if start < 2 else _shuffle_slots(rng, first, slots)
    order = evaluate(grams, permutation)
    order = assign_slots(grams, order, aligned=start != 1)
    order = assign_slots(grams, order)
    order = assign_random(rng, grams, order, num_assignments // 4)
    if best is None or order.log_det < best.log_det:
      best = order
  best = assign_random(rng, grams, best, num_assignments)
  return swap_rounds(grams, best, num_swap_rounds)


def superblock(grams: Grams) -> int:
  """Channels of the smallest block that holds whole sub-vectors of every kernel."""
  return math.lcm(*(gram.slots for gram in grams))


def sorted_permutation(grams: Grams) -> np.ndarray:
  """[C]: slot by slot, channels of falling log-determinant.

  A channel's log-determinant is that of its taps, over the rows of a kernel.
  Kernels of 2 and of 8 slots are both served: the positions of a superblock are
  filled in the order of their slot among 2, then of their slot among 8.
  """
  score = sum(
    share * _channel_log_dets(gram)
    for share, gram in zip(shares(grams), grams, strict=True)
  )
  ranked = np.argsort(-score, kind="stable")
  slots = superblock(grams)
  position = np.arange(slots)
  sizes = sorted({gram.slots for gram in grams}, reverse=True)
  order = np.lexsort([position % size for size in sizes])
  permutation = np.empty((len(ranked) // slots, slots), np.intp)
  permutation[:, order] = ranked.reshape(slots, -1).T
  return permutation.reshape(-1)


def assign_slots(grams: Grams, order: Order, aligned: bool = False, slots=None) -> Order:
  """Reorders the channels of each slot in turn by an assignment.

  Args:
    grams: one for each kernel.
    order: where to start.
    aligned: use the made-up covariance of the aligned start, and take the
      result even where F rises.
  """
  slots = slots or superblock(grams)
  for slot in range(slots):
    holes = np.arange(slot, len(order.permutation), slots)
    found = _assign(grams, order, holes, aligned)
    if aligned or found.log_det < order.log_det - _MIN_GAIN:
      order = found
  return order


def assign_random(
  rng: np.random.Generator, grams: Grams, order: Order, num_assignments: int
) -> Order:
  """Assignments with one hole in a random slot of every superblock."""
  sizes = sorted({gram.slots for gram in grams})
  for _ in range(num_assignments):
    slots = sizes[rng.integers(len(sizes))] if MODE else superblock(grams)
    starts = np.arange(0, len(order.permutation), slots)
    holes = starts + rng.integers(slots, size=len(starts))
    found = _assign(grams, order, holes)
    if found.log_det < order.log_det - _MIN_GAIN:
      order = found
  return order


def swap_rounds(grams: Grams, order: Order, num_rounds: int) -> Order:
  """Rounds of exact swaps until none of the promising ones lowers F."""
  for _ in range(num_rounds):
    found = _swap_round(grams, order)
    if found.log_det > order.log_det - _MIN_GAIN:
      break
    order = found
  return order


def shares(grams: Grams) -> np.ndarray:
  """Each kernel's share in the sub-vectors of all of them."""
  sizes = np.array([gram.num_vectors for gram in grams], np.float64)
  return sizes / sizes.sum()


def placement_scores(
  gram: covariance.ChannelGram,
  permutation: np.ndarray,
  sums: covariance.Moments,
  inverse: np.ndarray,
  positions: np.ndarray,
) -> np.ndarray:
  """tr(M dS) of each channel at each position, all others being as they are.

  The differences of a column are those of the bound of the module docstring;
  the mean's share is linearized, which bounds it too, as -mean mean^T is
  concave.

  Args:
    gram: of the kernel.
    permutation: [C].
    sums: its moments.
    inverse: [D, D], M.
    positions: [P], in different blocks.

  Returns:
    [C, P].
  """
  num_channels, taps = gram.sums.shape
  inverse = inverse.reshape(gram.slots, taps, gram.slots, taps) / gram.degrees
  tiles = gram.products.reshape(num_channels, num_channels, taps * taps)
  blocks = permutation.reshape(-1, gram.slots)
  each = np.arange(num_channels)
  alone = np.stack([inverse[a, :, a].ravel() for a in range(gram.slots)])
  mean = sums.first.reshape(gram.slots, taps) / gram.num_vectors
  pull = np.einsum("ct,ctas->as", mean, inverse)
  scores = alone @ tiles[each, each].T - 2 * pull @ gram.sums.T
  block, slot = np.divmod(positions, gram.slots)
  table = scores[slot]
  cross = 2 * inverse.transpose(2, 0, 1, 3).reshape(
    gram.slots, gram.slots, taps * taps
  )
  for row, hole, a in zip(table, block, slot, strict=True):
    for c, channel in enumerate(blocks[hole]):
      if c != a:
        row += tiles[channel] @ cross[a, c]
  return table.T


def _objective(grams: Grams, sums: Sequence[covariance.Moments]) -> np.ndarray:
  """F for moments whose leading axes are different orders."""
  return sum(
    share * covariance.log_det(gram, moments)
    for share, gram, moments in zip(shares(grams), grams, sums, strict=True)
  )


def _scores(
  grams: Grams, order: Order, positions: np.ndarray, aligned: bool = False
) -> np.ndarray:
  """`placement_scores` [C, P] of the weighted sum of all kernels."""
  total = 0.0
  for share, gram, sums in zip(shares(grams), grams, order.sums, strict=True):
    matrix = covariance.covariance(gram, sums)
    if aligned:
      matrix = _aligned(matrix, gram.slots)
    total = total + share * placement_scores(
      gram, order.permutation, sums, np.linalg.inv(matrix), positions
    )
  return total


def _assign(
  grams: Grams, order: Order, holes: np.ndarray, aligned: bool = False
) -> Order:
  """Fills the holes with their own channels in the order that scores least."""
  channels = order.permutation[holes]
  cost = _scores(grams, order, holes, aligned)[channels]
  taken, hole = optimize.linear_sum_assignment(cost)
  permutation = order.permutation.copy()
  permutation[holes[hole]] = channels[taken]
  return evaluate(grams, permutation)


def _swap_round(grams: Grams, order: Order) -> Order:
  """Applies improving swaps of disjoint superblocks, the best first."""
  size = len(order.permutation)
  scores = _scores(grams, order, np.arange(size))[order.permutation]
  change = scores + scores.T - np.add.outer(scores.diagonal(), scores.diagonal())
  pairs = np.stack(np.triu_indices(size, 1), axis=1)
  count = min(_PAIRS_PER_CHANNEL * size, len(pairs))
  promising = np.argpartition(change[pairs[:, 0], pairs[:, 1]], count - 1)
  pairs = pairs[promising[:count]]
  changes = [
    covariance.swap_moments(gram, order.permutation, pairs) for gram in grams
  ]
  exact = _objective(
    grams, [covariance.add(*s) for s in zip(order.sums, changes, strict=True)]
  )
  return _apply_disjoint(grams, order, pairs, changes, exact)


def _apply_disjoint(
  grams: Grams,
  order: Order,
  pairs: np.ndarray,
  changes: Sequence[covariance.Moments],
  exact: np.ndarray,
) -> Order:
  """Applies swaps one after the other, best first, where F still falls.

  The change of a swap is that of `order` only as long as no swap before it
  touched its blocks, so others wait for the next round.
  """
  blocks = pairs // superblock(grams)
  ranked = np.argsort(exact, kind="stable")
  touched: set[int] = set()
  permutation, sums, value = order.permutation.copy(), order.sums, order.log_det
  for row in ranked[exact[ranked] < value - _MIN_GAIN]:
    if touched.intersection(blocks[row].tolist()):
      continue
    trial = tuple(
      covariance.add(old, covariance.Moments(new.second[row], new.first[row]))
      for old, new in zip(sums, changes, strict=True)
    )
    found = _objective(grams, trial)
    if found < value - _MIN_GAIN:
      sums, value = trial, found
      touched.update(blocks[row].tolist())
      permutation[pairs[row]] = permutation[pairs[row, ::-1]]
  return evaluate(grams, permutation)


def _shuffle_slots(
  rng: np.random.Generator, permutation: np.ndarray, slots: int
) -> np.ndarray:
  """The same channels in every slot, in another order."""
  blocks = permutation.reshape(-1, slots)
  return rng.permuted(blocks, axis=0).reshape(-1)


def _aligned(matrix: np.ndarray, slots: int) -> np.ndarray:
  """A covariance with these slots' own blocks, and equal slot correlations."""
  taps = len(matrix) // slots
  blocks = matrix.reshape(slots, taps, slots, taps)
  each = np.arange(slots)
  roots = np.linalg.cholesky(blocks[each, :, each])
  made = _ALIGNED_CORRELATION * np.einsum("ats,cus->atcu", roots, roots)
  made[each, :, each] = blocks[each, :, each]
  return made.reshape(matrix.shape)


def _channel_log_dets(gram: covariance.ChannelGram) -> np.ndarray:
  """[C] log-determinant of the covariance of each channel's taps."""
  num_channels, taps = gram.sums.shape
  rows = gram.num_vectors * gram.slots // num_channels
  single = gram._replace(slots=1, num_vectors=rows)
  each = np.arange(num_channels)
  return covariance.log_det(
    single, covariance.Moments(gram.products[each, each], gram.sums)
  )

"""Orders of a channel group, and what they are worth to its kernels.

A group's channels are read by one or more kernels k, and one order serves all
of them. Its worth is F(order) = sum_k share_k * log det cov_k(order), where
share_k is the share of kernel k in the sub-vectors of all of them. For a given
rate the error of a number of kernel k grows with exp(log det cov_k / D_k), and
the kernel has N_k * D_k numbers: so F weighs all numbers alike.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from pqf_jax.permutation import covariance

Grams = Sequence[covariance.ChannelGram]
"""One for each kernel that reads the group's channels."""

CovarianceModel = Callable[[np.ndarray, int], np.ndarray]
"""(covariance [D, D], slots) -> the covariance whose inverse is to be used."""

# A smaller gain is rounding.
MIN_GAIN = 1e-9
# Bytes of tiles that are gathered at once: they should stay in cache. A gather
# of larger slabs, all tiles of one channel, takes longer than their products.
_LARGEST_GATHER = 2**18
_LARGEST_SLAB = 2**16


class Order(NamedTuple):
  """One order of a group's channels and what it is worth.

  Attributes:
    permutation: [C] int; new channel i is old channel `permutation[i]`.
    sums: the moments of every kernel in this order.
    log_det: F.
  """

  permutation: np.ndarray
  sums: tuple[covariance.Moments, ...]
  log_det: float


def evaluate(grams: Grams, permutation: np.ndarray) -> Order:
  """The order of this permutation [C], with its worth."""
  sums = tuple(covariance.moments(gram, permutation) for gram in grams)
  return Order(permutation, sums, float(objective(grams, sums)))


def objective(grams: Grams, sums: Sequence[covariance.Moments]) -> np.ndarray:
  """F [...] of moments whose leading axes are different orders."""
  return sum(
    share * covariance.log_det(gram, moments)
    for share, gram, moments in zip(shares(grams), grams, sums, strict=True)
  )


def shares(grams: Grams) -> np.ndarray:
  """[kernels]: each one's share in the sub-vectors of all."""
  sizes = np.array([gram.num_vectors for gram in grams], np.float64)
  return sizes / sizes.sum()


def superblock(grams: Grams) -> int:
  """Channels of the smallest block that cuts no kernel's sub-vectors."""
  return math.lcm(*(gram.slots for gram in grams))


def measured(matrix: np.ndarray, slots: int) -> np.ndarray:
  """The `CovarianceModel` that believes what was measured."""
  del slots
  return matrix


def placement_scores(
  grams: Grams,
  order: Order,
  positions: np.ndarray,
  model: CovarianceModel = measured,
) -> np.ndarray:
  """The linear bound on F of each channel at each position.

  log det is concave, so with M the inverse covariance a change dS of the
  covariance gives log det(S + dS) <= log det S + tr(M dS). A score is the part
  of sum_k share_k * tr(M_k S_k) that depends on who is at this position, all
  other positions being as they are: only differences within a column mean
  anything. The mean's part of S is linearized too, which is a bound as well,
  because -mean mean^T is concave.

  Args:
    grams: of the kernels.
    order: the order that M is taken from.
    positions: [P].
    model: changes the covariance before it is inverted.

  Returns:
    [C, P].
  """
  total = np.zeros((len(order.permutation), len(positions)))
  for share, gram, sums in zip(shares(grams), grams, order.sums, strict=True):
    matrix = model(covariance.covariance(gram, sums), gram.slots)
    inverse = np.linalg.inv(matrix) * (share / gram.degrees)
    total += _scores(gram, order.permutation, sums, inverse, positions)
  return total


def _scores(
  gram: covariance.ChannelGram,
  permutation: np.ndarray,
  sums: covariance.Moments,
  inverse: np.ndarray,
  positions: np.ndarray,
) -> np.ndarray:
  """`placement_scores` [C, P] of one kernel, with `inverse` [D, D] for M."""
  num_channels, taps = gram.sums.shape
  slots = gram.slots
  tiles = gram.products.reshape(num_channels, num_channels, taps * taps)
  by_slot = inverse.reshape(slots, taps, slots, taps).swapaxes(1, 2)
  each = np.arange(slots)
  own = by_slot[each, each].reshape(slots, -1)
  mean = sums.first / gram.num_vectors
  pull = (inverse @ mean).reshape(slots, taps)
  channels = np.arange(num_channels)
  alone = own @ tiles[channels, channels].T - 2 * pull @ gram.sums.T

  block, slot = np.divmod(positions, slots)
  # The channels that share a block with each position, and their slots.
  others = np.argsort(np.eye(slots, dtype=bool), axis=1, kind="stable")
  other = others[slot, :-1]
  mates = permutation.reshape(-1, slots)[block[:, None], other]
  cross = 2 * by_slot.swapaxes(0, 1).reshape(slots, slots, -1)
  pairs = _weighted_tiles(tiles, mates, cross[slot[:, None], other])
  return (alone[slot] + pairs).T


def _weighted_tiles(
  tiles: np.ndarray, mates: np.ndarray, weights: np.ndarray
) -> np.ndarray:
  """[P, C]: tiles [C, C, T^2] of mates [P, Q-1] times weights [P, Q-1, T^2]."""
  total = np.zeros((len(mates), len(tiles)))
  slab = tiles[0].nbytes
  if slab <= _LARGEST_SLAB:
    count = max(1, _LARGEST_GATHER // (slab * max(1, mates.shape[1])))
    for start in range(0, len(mates), count):
      part = slice(start, start + count)
      gathered = tiles[mates[part]]
      total[part] = np.einsum("pmct,pmt->pc", gathered, weights[part])
    return total
  for row, channels, columns in zip(total, mates, weights, strict=True):
    for channel, column in zip(channels, columns, strict=True):
      row += tiles[channel] @ column
  return total

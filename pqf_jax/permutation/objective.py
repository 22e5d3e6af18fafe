"""The objective of the search: how well an order serves all kernels of a group.

A group's channels are read by one or more kernels k, and one order serves all
of them. The objective is F(order) = sum_k share_k * log det cov_k(order), where
share_k is the share of kernel k in the sub-vectors of all of them. For a given
rate the error of a weight of kernel k grows with exp(log det cov_k / D_k), and
the kernel has N_k * D_k weights: so F counts all weights alike.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from pqf_jax.permutation import covariance

Grams = Sequence[covariance.ChannelGram]
"""One for each kernel that reads the group's channels."""

CovarianceModel = Callable[[np.ndarray, int], np.ndarray]
"""(covariance [D, D], slots) -> the covariance that is inverted instead."""

# A smaller gain is rounding.
MIN_GAIN = 1e-9
# Bytes of products gathered at once: they should stay in cache. A gather of
# larger slabs, all products of one channel, takes longer than multiplying them.
_LARGEST_GATHER = 2**18
_LARGEST_SLAB = 2**16


class ScoredOrder(NamedTuple):
  """One order of a group's channels, with its value of the objective.

  Attributes:
    permutation: [C] int; new channel i is old channel `permutation[i]`.
    moments: of every kernel in this order.
    log_det: F.
  """

  permutation: np.ndarray
  moments: tuple[covariance.Moments, ...]
  log_det: float


def evaluate(grams: Grams, permutation: np.ndarray) -> ScoredOrder:
  """Scores the order of a permutation [C]."""
  moments = tuple(covariance.order_moments(gram, permutation) for gram in grams)
  return ScoredOrder(permutation, moments, float(mean_log_det(grams, moments)))


def mean_log_det(
  grams: Grams, moments: Sequence[covariance.Moments]
) -> np.ndarray:
  """Returns F [...] of moments whose leading axes are different orders."""
  kernels = zip(shares(grams), grams, moments, strict=True)
  return sum(share * covariance.log_det(gram, m) for share, gram, m in kernels)


def shares(grams: Grams) -> np.ndarray:
  """Returns [kernels], each one's share in the sub-vectors of all."""
  sizes = np.array([gram.num_subvectors for gram in grams], np.float64)
  return sizes / sizes.sum()


def superblock(grams: Grams) -> int:
  """Returns the fewest channels that hold whole sub-vectors of every kernel."""
  return math.lcm(*(gram.slots for gram in grams))


def measured(matrix: np.ndarray, slots: int) -> np.ndarray:
  """Returns the measured covariance: the usual `CovarianceModel`."""
  del slots
  return matrix


def placement_scores(
  grams: Grams,
  order: ScoredOrder,
  positions: np.ndarray,
  model: CovarianceModel = measured,
) -> np.ndarray:
  """Bounds F linearly for each channel at each position.

  log det is concave, so with M the inverse covariance a change dS of the
  covariance gives log det(S + dS) <= log det S + tr(M dS). A score is the part
  of sum_k share_k * tr(M_k S_k) that depends on the channel at this position,
  all other positions being as they are: only differences within a column mean
  anything. The mean's part of S is linearized too, which is a bound as well,
  because -mean mean^T is concave.

  Returns:
    [C, P], for `positions` [P]; M is the inverse of what `model` makes of the
    covariance in this order.
  """
  total = np.zeros((len(order.permutation), len(positions)))
  kernels = zip(shares(grams), grams, order.moments, strict=True)
  for share, gram, moments in kernels:
    matrix = model(covariance.covariance(gram, moments), gram.slots)
    inverse = np.linalg.inv(matrix) * (share / gram.degrees)
    total += _scores(gram, order.permutation, moments, inverse, positions)
  return total


def _scores(
  gram: covariance.ChannelGram,
  permutation: np.ndarray,
  moments: covariance.Moments,
  inverse: np.ndarray,
  positions: np.ndarray,
) -> np.ndarray:
  """Returns `placement_scores` [C, P] of one kernel; `inverse` [D, D] is M."""
  num_channels, taps = gram.sums.shape
  slots = gram.slots
  products = gram.products.reshape(num_channels, num_channels, taps * taps)
  by_slot = inverse.reshape(slots, taps, slots, taps).swapaxes(1, 2)
  each = np.arange(slots)
  diagonal = by_slot[each, each].reshape(slots, -1)
  mean = moments.first / gram.num_subvectors
  mean_part = (inverse @ mean).reshape(slots, taps)
  channels = np.arange(num_channels)
  alone = (
    diagonal @ products[channels, channels].T - 2 * mean_part @ gram.sums.T
  )

  block, slot = np.divmod(positions, slots)
  # The channels that share a block with each position, and their slots.
  others = np.argsort(np.eye(slots, dtype=bool), axis=1, kind="stable")
  other = others[slot, :-1]
  mates = permutation.reshape(-1, slots)[block[:, None], other]
  cross = 2 * by_slot.swapaxes(0, 1).reshape(slots, slots, -1)
  pairs = _weighted_products(products, mates, cross[slot[:, None], other])
  return (alone[slot] + pairs).T


def _weighted_products(
  products: np.ndarray, mates: np.ndarray, weights: np.ndarray
) -> np.ndarray:
  """Sums products [C, C, T^2] of mates [P, Q-1] by weights, to [P, C]."""
  total = np.zeros((len(mates), len(products)))
  slab = products[0].nbytes
  if slab <= _LARGEST_SLAB:
    count = max(1, _LARGEST_GATHER // (slab * max(1, mates.shape[1])))
    for start in range(0, len(mates), count):
      part = slice(start, start + count)
      gathered = products[mates[part]]
      total[part] = np.einsum("pmct,pmt->pc", gathered, weights[part])
    return total
  for row, channels, columns in zip(total, mates, weights, strict=True):
    for channel, column in zip(channels, columns, strict=True):
      row += products[channel] @ column
  return total

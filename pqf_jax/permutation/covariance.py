"""Log-determinants of sub-vector covariances, by channel Gram matrices.

A kernel with C input channels of T taps each is cut into sub-vectors of Q
consecutive channels, D = Q * T weights. For Gaussian sub-vectors the error of
the best code of a given rate grows with the determinant of their covariance, so
a good order of the channels has a small one (section 3.2 of "Permute, Quantize,
and Fine-tune", arXiv 2010.15703).

Let G[i, j] = W_i^T W_j be the T x T products of channels i and j, summed over
the rows of the kernel. With the order `permutation`, cut into blocks b of Q
slots, the covariance is computed from two sums over all N sub-vectors:

    second[a, c] = sum_b G[permutation[b, a], permutation[b, c]]
    first[a]     = sum_b sums[permutation[b, a]]
    covariance   = (second - first first^T / N) / (N - 1)

so that no order needs a pass over the weights. Everything here is float64 NumPy
on the host: determinants at D = 18 span hundreds of nats and two orders may
differ by 1e-6 of one; the one large matrix product is done once a kernel.
"""

import itertools
from typing import NamedTuple

import numpy as np

# Rows of the Gram matrix that are computed together.
_STRIP = 256


class ChannelGram(NamedTuple):
  """Gram matrix of one kernel's input channels, which scores their orders.

  Attributes:
    products: [C, C, T, T] float64, G above.
    sums: [C, T] float64, every channel's taps summed over the rows.
    slots: Q, channels that share a sub-vector; divides C.
    num_subvectors: N.
    ridge: added to the diagonal of every covariance; 0 gives the plain one.
  """

  products: np.ndarray
  sums: np.ndarray
  slots: int
  num_subvectors: int
  ridge: float

  @property
  def degrees(self) -> int:
    """Returns N - 1, the divisor of an unbiased covariance."""
    return max(self.num_subvectors - 1, 1)


class Moments(NamedTuple):
  """Sums over sub-vectors x; leading axes are different orders.

  Attributes:
    second: [..., D, D], the sum of x x^T.
    first: [..., D], the sum of x.
  """

  second: np.ndarray
  first: np.ndarray

  def at(self, index: int) -> "Moments":
    """Returns the moments of one of several orders."""
    return Moments(self.second[index], self.first[index])


def channel_gram(
  weights: np.ndarray, *, slots: int, relative_ridge: float = 0.0
) -> ChannelGram:
  """Computes the products of all pairs of channels.

  Args:
    weights: [rows, C, T]; a row is what one output channel reads.
    slots: Q, channels that share a sub-vector.
    relative_ridge: `ridge` in units of the mean square of a weight, so that
      dead, constant or duplicate channels give a finite log-determinant.

  Returns:
    The Gram matrix, of C^2 * T^2 float64 numbers.
  """
  rows, num_channels, taps = weights.shape
  flat = np.asarray(weights, np.float64).reshape(rows, num_channels * taps)
  products = np.empty((num_channels, num_channels, taps, taps))
  # Strips of channels, so that the copies below stay in cache. Each strip is
  # multiplied only with itself and the later ones, and the result mirrored:
  # half of the multiplications.
  strip = max(1, _STRIP // taps)
  for start in range(0, num_channels, strip):
    stop = min(start + strip, num_channels)
    part = flat[:, start * taps : stop * taps].T @ flat[:, start * taps :]
    pairs = part.reshape(stop - start, taps, -1, taps).swapaxes(1, 2)
    products[start:stop, start:] = pairs
    products[stop:, start:stop] = pairs[:, stop - start :].transpose(1, 0, 3, 2)
  return ChannelGram(
    products,
    flat.sum(axis=0).reshape(num_channels, taps),
    slots,
    rows * num_channels // slots,
    relative_ridge * float(np.mean(np.square(flat))),
  )


def order_moments(gram: ChannelGram, permutation: np.ndarray) -> Moments:
  """Sums over all sub-vectors with the channels in the order [C]."""
  parts = _block_moments(gram, permutation.reshape(-1, gram.slots))
  return Moments(parts.second.sum(axis=0), parts.first.sum(axis=0))


def swap_moments(
  gram: ChannelGram, permutation: np.ndarray, pairs: np.ndarray
) -> Moments:
  """Computes what swapping two positions of an order adds to its moments.

  Each row of `pairs` [P, 2] is one swap, on its own; each of the P changes is
  to be added to `order_moments(gram, permutation)`.
  """
  blocks = permutation.reshape(-1, gram.slots)
  block, slot = np.divmod(pairs, gram.slots)
  before = blocks[block]
  after = before.copy()
  inside = block[:, 0] == block[:, 1]
  # A swap inside a block changes both of its copies, and then counts half.
  for copy, side in itertools.product((0, 1), repeat=2):
    rows = np.flatnonzero(inside | (copy == side))
    partner = permutation[pairs[rows, 1 - side]]
    after[rows, copy, slot[rows, side]] = partner
  share = np.where(inside, 0.5, 1.0)
  new, old = _block_moments(gram, after), _block_moments(gram, before)
  return Moments(
    (new.second - old.second).sum(axis=1) * share[:, None, None],
    (new.first - old.first).sum(axis=1) * share[:, None],
  )


def add(left: Moments, right: Moments) -> Moments:
  """Adds a change from `swap_moments` to moments, broadcast over orders."""
  return Moments(left.second + right.second, left.first + right.first)


def covariance(gram: ChannelGram, moments: Moments) -> np.ndarray:
  """Returns the unbiased covariance [..., D, D], plus the ridge."""
  outer = moments.first[..., :, None] * moments.first[..., None, :]
  scatter = moments.second - outer / gram.num_subvectors
  return scatter / gram.degrees + gram.ridge * np.eye(moments.first.shape[-1])


def log_det(gram: ChannelGram, moments: Moments) -> np.ndarray:
  """Returns the covariance's log-determinant [...] in nats; -inf: singular."""
  sign, value = np.linalg.slogdet(covariance(gram, moments))
  # Rounding may make a singular covariance slightly indefinite.
  return np.where(sign > 0, value, -np.inf)


def _block_moments(gram: ChannelGram, blocks: np.ndarray) -> Moments:
  """Returns the moments of each block [..., Q] of channels on its own."""
  pairs = gram.products[blocks[..., :, None], blocks[..., None, :]]
  block_length = blocks.shape[-1] * gram.sums.shape[1]
  lead = blocks.shape[:-1]
  return Moments(
    pairs.swapaxes(-3, -2).reshape(*lead, block_length, block_length),
    gram.sums[blocks].reshape(*lead, block_length),
  )

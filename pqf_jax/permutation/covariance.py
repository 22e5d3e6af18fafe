"""Log-determinants of sub-vector covariances, by channel Gram matrices.

A kernel with C input channels of T taps each is cut into sub-vectors of Q
consecutive channels, D = Q * T numbers. For Gaussian sub-vectors the error of
the best code of a given rate grows with the determinant of their covariance, so
a good order of the channels has a small one (section 3.2 of "Permute, Quantize,
and Fine-tune", arXiv 2010.15703).

With G[i, j] = W_i^T W_j (the T x T products of channels i and j, summed over
the rows of the kernel) and the order `permutation`, cut into blocks b of Q
slots, the sums over all N sub-vectors that the covariance is made of are

    second[a, c] = sum_b G[permutation[b, a], permutation[b, c]]
    first[a]     = sum_b sums[permutation[b, a]]
    covariance   = (second - first first^T / N) / (N - 1)

so no order needs a pass over the weights. Everything here is float64 NumPy on
the host: determinants at D = 18 span hundreds of nats and two orders may differ
by 1e-6 of one; the one large matrix product is done once a kernel.
"""

import itertools
from typing import NamedTuple

import numpy as np

# Rows of the Gram matrix that are computed together.
_STRIP = 256


class ChannelGram(NamedTuple):
  """What the orders of one kernel's input channels are judged by.

  Attributes:
    products: [C, C, T, T] float64, G above.
    sums: [C, T] float64, every channel's taps summed over the rows.
    slots: Q, channels that share a sub-vector; divides C.
    num_vectors: N, sub-vectors of the kernel.
    ridge: added to the diagonal of every covariance; 0 gives the plain one.
  """

  products: np.ndarray
  sums: np.ndarray
  slots: int
  num_vectors: int
  ridge: float

  @property
  def degrees(self) -> int:
    """N - 1, what the scatter is divided by."""
    return max(self.num_vectors - 1, 1)


class Moments(NamedTuple):
  """Sums over sub-vectors x; leading axes are different orders.

  Attributes:
    second: [..., D, D], the sum of x x^T.
    first: [..., D], the sum of x.
  """

  second: np.ndarray
  first: np.ndarray

  def at(self, index: int) -> "Moments":
    """One of several orders."""
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
    The Gram matrix, C^2 * T^2 float64 numbers, and what goes with it.
  """
  rows, num_channels, taps = weights.shape
  flat = np.asarray(weights, np.float64).reshape(rows, num_channels * taps)
  products = np.empty((num_channels, num_channels, taps, taps))
  # Strips of channels, so that the copies below stay in cache. Each strip is
  # computed from itself to the end, and mirrored: half of the multiplications.
  strip = max(1, _STRIP // taps)
  for start in range(0, num_channels, strip):
    stop = min(start + strip, num_channels)
    part = flat[:, start * taps : stop * taps].T @ flat[:, start * taps :]
    tiles = part.reshape(stop - start, taps, -1, taps).swapaxes(1, 2)
    products[start:stop, start:] = tiles
    products[stop:, start:stop] = tiles[:, stop - start :].transpose(1, 0, 3, 2)
  return ChannelGram(
    products,
    flat.sum(axis=0).reshape(num_channels, taps),
    slots,
    rows * num_channels // slots,
    relative_ridge * float(np.mean(np.square(flat))),
  )


def moments(gram: ChannelGram, permutation: np.ndarray) -> Moments:
  """The sums over all sub-vectors when the channels are in this order.

  Args:
    gram: of the kernel.
    permutation: [C]; new channel i is old channel `permutation[i]`.
  """
  blocks = permutation.reshape(-1, gram.slots)
  parts = _block_moments(gram, blocks)
  return Moments(parts.second.sum(axis=0), parts.first.sum(axis=0))


def swap_moments(
  gram: ChannelGram, permutation: np.ndarray, pairs: np.ndarray
) -> Moments:
  """What swapping two positions of an order adds to its moments.

  Args:
    gram: of the kernel.
    permutation: [C], the order before the swaps.
    pairs: [P, 2] positions; each row is one swap, and not followed by others.

  Returns:
    P changes, to be added to `moments(gram, permutation)`.
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
  """The moments after a change of `swap_moments`, broadcast over orders."""
  return Moments(left.second + right.second, left.first + right.first)


def covariance(gram: ChannelGram, sums: Moments) -> np.ndarray:
  """[..., D, D] unbiased covariance of the sub-vectors, plus the ridge."""
  outer = sums.first[..., :, None] * sums.first[..., None, :]
  scatter = sums.second - outer / gram.num_vectors
  return scatter / gram.degrees + gram.ridge * np.eye(sums.first.shape[-1])


def log_det(gram: ChannelGram, sums: Moments) -> np.ndarray:
  """[...] natural log-determinant of the covariance; -inf if singular."""
  sign, value = np.linalg.slogdet(covariance(gram, sums))
  # Rounding may make a singular covariance slightly indefinite.
  return np.where(sign > 0, value, -np.inf)


def _block_moments(gram: ChannelGram, blocks: np.ndarray) -> Moments:
  """The share [..., D, D], [..., D] of each block [..., Q] of channels."""
  tiles = gram.products[blocks[..., :, None], blocks[..., None, :]]
  block_length = blocks.shape[-1] * gram.sums.shape[1]
  lead = blocks.shape[:-1]
  return Moments(
    tiles.swapaxes(-3, -2).reshape(*lead, block_length, block_length),
    gram.sums[blocks].reshape(*lead, block_length),
  )

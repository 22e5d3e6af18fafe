"""Gram matrices against `numpy.cov` of the sub-vectors themselves."""

import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from pqf_jax.permutation import covariance

SHAPES = st.sampled_from(
  [
    # rows, channels, taps, slots
    (7, 8, 3, 2),
    (9, 12, 1, 4),
    (11, 12, 2, 3),
    (30, 4, 1, 4),
  ]
)


def numpy_log_det(weights, permutation, slots):
  sub_vectors = weights[:, permutation].reshape(-1, slots * weights.shape[2])
  return np.linalg.slogdet(np.cov(sub_vectors, rowvar=False))[1]


@hypothesis.given(SHAPES, st.integers(0, 2**32 - 1))
@hypothesis.settings(deadline=None, max_examples=30)
def test_log_det_is_that_of_numpy_cov(shape, seed):
  *size, slots = shape
  rng = np.random.default_rng(seed)
  # A mean, so that forgetting to subtract it shows.
  weights = rng.normal(loc=0.5, size=size)
  permutation = rng.permutation(size[1])
  gram = covariance.channel_gram(weights, slots=slots)
  got = covariance.log_det(gram, covariance.order_moments(gram, permutation))
  expected = numpy_log_det(weights, permutation, slots)
  np.testing.assert_allclose(got, expected, atol=1e-9)


@pytest.mark.parametrize("shape", [(7, 8, 3, 2), (9, 8, 1, 4)])
def test_a_swap_changes_the_moments_as_computing_them_again(shape):
  *size, slots = shape
  rng = np.random.default_rng(1)
  gram = covariance.channel_gram(rng.normal(loc=0.5, size=size), slots=slots)
  permutation = rng.permutation(size[1])
  # All pairs: within a block, across blocks, and a position with itself.
  pairs = np.array(list(itertools.product(range(size[1]), repeat=2)))
  before = covariance.order_moments(gram, permutation)
  change = covariance.swap_moments(gram, permutation, pairs)
  after = covariance.add(before, change)
  for row, pair in enumerate(pairs):
    swapped = permutation.copy()
    swapped[pair] = swapped[pair[::-1]]
    expected = covariance.order_moments(gram, swapped)
    np.testing.assert_allclose(after.second[row], expected.second, atol=1e-9)
    np.testing.assert_allclose(after.first[row], expected.first, atol=1e-9)


def test_tiny_weights_do_not_underflow():
  weights = np.random.default_rng(0).normal(size=(32, 16, 9))
  grams = [
    covariance.channel_gram(weights * scale, slots=2) for scale in (1, 1e-9)
  ]
  plain, tiny = (
    covariance.log_det(gram, covariance.order_moments(gram, np.arange(16)))
    for gram in grams
  )
  np.testing.assert_allclose(tiny, plain + 18 * np.log(1e-18), rtol=1e-12)


def test_the_ridge_makes_dead_channels_finite():
  weights = np.random.default_rng(0).normal(size=(16, 8, 1))
  weights[:, ::2] = 0
  plain = covariance.channel_gram(weights, slots=2)
  ridged = covariance.channel_gram(weights, slots=2, relative_ridge=1e-8)
  moments = covariance.order_moments(plain, np.arange(8))
  assert covariance.log_det(plain, moments) == -np.inf
  expected = np.log(1e-8 * np.mean(weights**2)) + np.log(
    np.var(weights[:, 1::2], ddof=1)
  )
  np.testing.assert_allclose(
    covariance.log_det(ridged, moments), expected, atol=1e-6
  )


@pytest.mark.parametrize("shape", [(5, 60, 9), (6, 300, 1), (3, 2, 300)])
def test_products_of_several_strips_are_those_of_all_pairs(shape):
  # More than 256 rows of the Gram matrix: some tiles are mirrored.
  weights = np.random.default_rng(2).normal(loc=0.5, size=shape)
  gram = covariance.channel_gram(weights, slots=2)
  expected = np.einsum("ras,rbt->abst", weights, weights)
  np.testing.assert_allclose(gram.products, expected, atol=1e-12)

"""The search, against all orders where they can be listed."""

import itertools

import numpy as np
import pytest

from pqf_jax.permutation import covariance, objective, search

SIZE = 8


def _different_orders(slots):
  """Yields the orders of 8 channels that give different covariances.

  Reordering the blocks changes nothing, nor does exchanging two slots in all
  blocks at once.
  """
  for tail in itertools.permutations(range(1, SIZE)):
    blocks = np.array((0, *tail)).reshape(-1, slots)
    if all(np.diff(blocks[0]) > 0) and all(np.diff(blocks.min(axis=1)) > 0):
      yield blocks.ravel()


def _weights(rng, taps):
  scale = rng.lognormal(size=(1, SIZE, 1))
  return rng.normal(size=(12, SIZE, taps)) * scale


@pytest.mark.parametrize("slots, taps", [(2, 1), (4, 1), (2, 2)])
def test_it_finds_the_best_of_all_orders(slots, taps):
  candidates = list(_different_orders(slots))
  assert len(candidates) == 840
  for seed in range(10):
    rng = np.random.default_rng(seed)
    weights = _weights(rng, taps)
    best = min(
      np.linalg.slogdet(
        np.cov(weights[:, order].reshape(-1, slots * taps), rowvar=False)
      )[1]
      for order in candidates
    )
    gram = covariance.channel_gram(weights, slots=slots)
    order = search.search_permutation(rng, [gram])
    np.testing.assert_allclose(order.log_det, best, atol=1e-9)


def test_it_finds_the_best_order_for_two_kernels():
  rng = np.random.default_rng(0)
  grams = [
    covariance.channel_gram(_weights(rng, taps), slots=slots)
    for slots, taps in ((2, 2), (4, 1))
  ]
  best = min(
    objective.evaluate(grams, np.array((0, *tail))).log_det
    for tail in itertools.permutations(range(1, SIZE))
  )
  order = search.search_permutation(rng, grams)
  np.testing.assert_allclose(order.log_det, best, atol=1e-9)


def test_assignments_never_hurt():
  rng = np.random.default_rng(1)
  grams = [
    covariance.channel_gram(rng.normal(size=(30, 48, taps)), slots=slots)
    for slots, taps in ((2, 3), (8, 1))
  ]
  start = objective.evaluate(grams, rng.permutation(48))
  slotted = search.assign_slots(grams, start)
  mixed = search.assign_random(rng, grams, slotted, 10)
  assert mixed.log_det < slotted.log_det < start.log_det
  for order in (slotted, mixed):
    np.testing.assert_array_equal(np.sort(order.permutation), np.arange(48))
    again = objective.evaluate(grams, order.permutation)
    assert again.log_det == order.log_det


def test_sorting_gives_each_slot_one_range_of_variances():
  rng = np.random.default_rng(2)
  scale = rng.permutation(2.0 ** np.arange(16))
  weights = rng.normal(size=(500, 16, 1)) * scale[:, None]
  grams = [covariance.channel_gram(weights, slots=slots) for slots in (8, 2)]
  ordered = scale[search.sorted_permutation(grams)]
  for slots in (2, 8):
    by_slot = ordered.reshape(-1, slots).T
    by_slot = by_slot[np.argsort(-by_slot[:, 0])]
    assert np.all(by_slot[:-1].min(axis=1) > by_slot[1:].max(axis=1))


def test_it_recovers_channels_that_belong_together():
  # Twins are equal up to noise; a code that pairs them needs half the numbers.
  rng = np.random.default_rng(3)
  first = rng.normal(size=(64, 16, 3))
  second = 0.5 * first + 0.01 * rng.normal(size=first.shape)
  weights = np.concatenate([first, second], axis=1)
  shuffle = rng.permutation(32)
  gram = covariance.channel_gram(weights[:, shuffle], slots=2)
  order = search.search_permutation(rng, [gram])
  pairs = shuffle[order.permutation].reshape(-1, 2)
  np.testing.assert_array_equal(abs(pairs[:, 0] - pairs[:, 1]), 16)


def test_the_authors_search_is_beaten():
  rng = np.random.default_rng(4)
  gram = covariance.channel_gram(rng.normal(size=(40, 64, 9)), slots=2)
  theirs = search.search_like_authors(rng, [gram], num_swaps=2000)
  ours = search.search_permutation(rng, [gram])
  start = objective.evaluate([gram], np.arange(64))
  assert ours.log_det < theirs.log_det < start.log_det

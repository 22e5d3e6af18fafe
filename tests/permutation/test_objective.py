"""The bound that the search minimizes, against the objective itself."""

import itertools

import numpy as np
import pytest

from pqf_jax.permutation import covariance, objective


def _grams(rng, *shapes):
  return [
    covariance.channel_gram(
      rng.normal(loc=0.3, size=(rows, channels, taps)), slots=slots
    )
    for rows, channels, taps, slots in shapes
  ]


CASES = [
  [(9, 12, 2, 2)],
  [(9, 12, 1, 4)],
  [(9, 12, 2, 2), (20, 12, 1, 4)],
]


@pytest.mark.parametrize("shapes", CASES)
def test_no_filling_of_the_holes_beats_its_bound(shapes):
  rng = np.random.default_rng(0)
  grams = _grams(rng, *shapes)
  order = objective.evaluate(grams, rng.permutation(12))
  holes = np.array([1, 4, 10])  # one in each superblock of 4, in any slot
  scores = objective.placement_scores(grams, order, holes)
  channels = order.permutation[holes]
  stay = scores[channels, range(3)].sum()
  gaps = []
  for who in itertools.permutations(range(3)):
    permutation = order.permutation.copy()
    permutation[holes] = channels[list(who)]
    bound = scores[channels[list(who)], range(3)].sum() - stay
    exact = objective.evaluate(grams, permutation).log_det - order.log_det
    gaps.append(bound - exact)
  assert min(gaps) > -1e-12
  assert max(gaps) > 1e-6  # it is a bound, not the objective


def test_the_bound_is_tight_for_small_changes():
  # Two of 400 blocks change. The second channel of a block is like the first
  # one, tap 0 like tap 1, all channels have different means, and they move to
  # the other slot: so every part of the bound matters, and much more than the
  # second-order terms.
  rng = np.random.default_rng(1)
  pair = rng.normal(size=(20, 400, 2, 2)) + rng.normal(1, size=(400, 2, 2))
  pair[:, :, 1, 0] = pair[:, :, 0, 1] + rng.normal(size=(20, 400))
  gram = covariance.channel_gram(pair.reshape(20, 800, 2), slots=2)
  order = objective.evaluate([gram], np.arange(800))
  bounds, changes = [], []
  for holes in np.arange(0, 80, 4)[:, None] + np.array([0, 3]):
    scores = objective.placement_scores([gram], order, holes)
    bounds.append((scores[holes[::-1]] - scores[holes]).diagonal().sum())
    permutation = np.arange(800)
    permutation[holes] = holes[::-1]
    changes.append(
      objective.evaluate([gram], permutation).log_det - order.log_det
    )
  largest = np.abs(bounds).max()
  np.testing.assert_allclose(changes, bounds, rtol=0, atol=0.05 * largest)


def test_the_objective_weights_kernels_by_their_sub_vectors():
  rng = np.random.default_rng(2)
  grams = _grams(rng, (10, 8, 1, 2), (15, 8, 1, 4))  # 40 and 30 sub-vectors
  alone = [objective.evaluate([gram], np.arange(8)).log_det for gram in grams]
  both = objective.evaluate(grams, np.arange(8)).log_det
  np.testing.assert_allclose(both, (40 * alone[0] + 30 * alone[1]) / 70)
  assert objective.superblock(grams) == 4


@pytest.mark.parametrize("shapes", [*CASES, [(9, 120, 3, 4)]])
def test_large_tiles_are_multiplied_as_small_ones_are(monkeypatch, shapes):
  rng = np.random.default_rng(3)
  grams = _grams(rng, *shapes)
  size = shapes[0][1]
  order = objective.evaluate(grams, rng.permutation(size))
  holes = rng.permutation(size)[: size // 2]
  small = objective.placement_scores(grams, order, holes)
  monkeypatch.setattr(objective, "_LARGEST_SLAB", 0)
  large = objective.placement_scores(grams, order, holes)
  np.testing.assert_allclose(small, large, atol=1e-12)

"""Swaps, against a search that computes `numpy.cov` after every one."""

import numpy as np
import pytest
import safetensors.numpy

from pqf_jax.permutation import covariance, objective, swaps


def numpy_search(weights, permutation, pairs, slots):
  """The authors' search, with nothing reused: (accepted swaps, last order)."""

  def log_det(permutation):
    ordered = weights[:, permutation]
    sub_vectors = ordered.reshape(-1, slots * weights.shape[2])
    return np.linalg.slogdet(np.cov(sub_vectors, rowvar=False))[1]

  permutation, accepted = permutation.copy(), 0
  best = log_det(permutation)
  for left, right in pairs:
    trial = permutation.copy()
    trial[[left, right]] = trial[[right, left]]
    value = log_det(trial)
    if value < best:
      best, permutation, accepted = value, trial, accepted + 1
  return accepted, permutation


@pytest.mark.parametrize(
  "rows, channels, taps, slots",
  [(24, 32, 9, 2), (32, 64, 1, 8), (10, 40, 1, 4)],
)
def test_the_same_swaps_are_accepted(rows, channels, taps, slots):
  rng = np.random.default_rng(rows)
  scale = rng.lognormal(size=(1, channels, 1))
  weights = rng.normal(size=(rows, channels, taps)) * scale
  _compare(rng, weights, slots, num_swaps=600)


@pytest.mark.parametrize(
  "name, slots, num_swaps",
  [
    ("layer1.0.conv2", 2, 400),
    ("layer2.0.downsample.0", 4, 1000),
    ("fc", 4, 1000),
  ],
)
def test_the_same_swaps_are_accepted_on_real_weights(
  shared_data, name, slots, num_swaps
):
  path = shared_data / "weights" / "resnet18_cifar10.safetensors"
  kernel = safetensors.numpy.load_file(path)[f"{name}.weight"]
  weights = kernel.astype(np.float64).reshape(*kernel.shape[:2], -1)
  _compare(np.random.default_rng(0), weights, slots, num_swaps)


def _compare(rng, weights, slots, num_swaps):
  size = weights.shape[1]
  pairs = rng.integers(size, size=(num_swaps, 2))
  start = rng.permutation(size)
  gram = covariance.channel_gram(weights, slots=slots)
  accepted, permutation = numpy_search(weights, start, pairs, slots)
  assert 10 < accepted < num_swaps // 2
  # Each kept swap changes which ones are kept after it, so the last order is
  # that of all decisions. The second kernel has no say.
  other = covariance.channel_gram(weights[:, ::-1], slots=slots)
  got = swaps.stochastic_swaps([gram, other], start, pairs)
  np.testing.assert_array_equal(got.permutation, permutation)
  expected = objective.evaluate([gram, other], permutation)
  np.testing.assert_allclose(got.log_det, expected.log_det)


def test_a_round_never_hurts_and_ends_where_no_swap_helps():
  rng = np.random.default_rng(3)
  grams = [
    covariance.channel_gram(rng.normal(size=(12, 8, taps)), slots=slots)
    for taps, slots in ((2, 2), (1, 4))
  ]
  order = objective.evaluate(grams, rng.permutation(8))
  values = [order.log_det]
  for _ in range(20):
    order = swaps.swap_round(grams, order)
    values.append(order.log_det)
  assert values[1] < values[0]
  assert np.all(np.diff(values) <= 1e-12)
  for left in range(8):
    for right in range(left):
      permutation = order.permutation.copy()
      permutation[[left, right]] = permutation[[right, left]]
      trial = objective.evaluate(grams, permutation).log_det
      assert trial > order.log_det - 1e-8

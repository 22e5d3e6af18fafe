"""Statistics and biases against the values that they give."""

import jax.numpy as jnp
import numpy as np
import pytest

from pqf_jax.calibration import moments, streams

CHANNELS = 3
MEAN, VAR = (
  jnp.asarray(values, jnp.float32) for values in ([0.5, -1, 0], [2, 0.3, 1])
)


@pytest.fixture(params=[1, 2])
def pairs(request):
  """Values with their channels along an axis, on two batches."""
  rng = np.random.default_rng(0)
  shape = [4, 5, 6]
  shape[request.param] = CHANNELS
  dense = rng.normal(1.0, 2.0, (2, *shape)).astype(np.float32)
  quantized = (0.6 * dense + rng.normal(size=dense.shape)).astype(np.float32)
  both = zip(dense, quantized, strict=True)
  return request.param, [streams.Pair(*map(jnp.asarray, pair)) for pair in both]


def _rows(arrays, axis):
  rows = [np.moveaxis(a, axis, -1).reshape(-1, CHANNELS) for a in arrays]
  return np.concatenate(rows)


def test_a_norm_gives_the_moments_of_the_dense_network(pairs):
  axis, values = pairs
  mean, var = moments.match_norm(values, axis, MEAN, VAR)
  before = (_rows([p.dense for p in values], axis) - np.array(MEAN)) / np.sqrt(
    VAR
  )
  after = (
    _rows([p.quantized for p in values], axis) - np.array(mean)
  ) / np.sqrt(var)
  np.testing.assert_allclose(after.mean(0), before.mean(0), atol=1e-5)
  np.testing.assert_allclose(after.std(0), before.std(0), rtol=1e-4)


def test_a_bias_gives_the_mean_of_the_dense_network(pairs):
  axis, values = pairs
  bias = moments.match_bias(values, axis, MEAN)
  before = _rows([p.dense for p in values], axis) + np.array(MEAN)
  after = _rows([p.quantized for p in values], axis) + np.array(bias)
  np.testing.assert_allclose(after.mean(0), before.mean(0), atol=1e-5)


def test_what_did_not_change_stays_to_the_bit(pairs):
  axis, values = pairs
  same = [streams.Pair(pair.dense, pair.dense) for pair in values]
  for found, given in zip(
    (
      *moments.match_norm(same, axis, MEAN, VAR),
      moments.match_bias(same, axis, MEAN),
    ),
    (MEAN, VAR, MEAN),
    strict=True,
  ):
    np.testing.assert_array_equal(found, given)

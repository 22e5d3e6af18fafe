"""Statistics and biases against the values that they give."""

import jax.numpy as jnp
import numpy as np
import pytest

from pqf_jax.calibration import moments, streams
from pqf_jax.discovery import masks as sample_masks

CHANNELS = 3
ALL = [jnp.ones((), bool)] * 2  # everything counts, in two batches
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
  mean, var = moments.match_norm(values, ALL, (axis,), MEAN, VAR)
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
  bias = moments.match_bias(values, ALL, (axis,), MEAN)
  before = _rows([p.dense for p in values], axis) + np.array(MEAN)
  after = _rows([p.quantized for p in values], axis) + np.array(bias)
  np.testing.assert_allclose(after.mean(0), before.mean(0), atol=1e-5)


def test_a_bias_of_heads_lies_along_several_axes(pairs):
  _, values = pairs
  shape = values[0].dense.shape[1:]
  bias = moments.match_bias(values, ALL, (1, 2), jnp.zeros((1, *shape)))
  means = [
    np.mean([pair.dense for pair in values], (0, 1)),
    np.mean([pair.quantized for pair in values], (0, 1)) + np.array(bias)[0],
  ]
  np.testing.assert_allclose(*means, atol=1e-5)


def test_what_did_not_change_stays_to_the_bit(pairs):
  axis, values = pairs
  same = [streams.Pair(pair.dense, pair.dense) for pair in values]
  for found, given in zip(
    (
      *moments.match_norm(same, ALL, (axis,), MEAN, VAR),
      moments.match_bias(same, ALL, (axis,), MEAN),
    ),
    (MEAN, VAR, MEAN),
    strict=True,
  ):
    np.testing.assert_array_equal(found, given)


@pytest.mark.parametrize("var", [0.0, 5.6e-45, 1e-39, 1e-12])
def test_a_channel_without_a_signal_stays_silent(var):
  # torchvision's MobileNetV2 has such norms: their layer only gives zeros.
  rng = np.random.default_rng(0)
  dense = jnp.zeros((8, CHANNELS))
  noise = jnp.asarray(rng.normal(0.2, 3.0, (8, CHANNELS)), jnp.float32)
  statistics = jnp.zeros(CHANNELS), jnp.full(CHANNELS, var, jnp.float32)
  kept = moments.match_norm(
    [streams.Pair(dense, dense)], ALL[:1], (1,), *statistics
  )
  for found, given in zip(kept, statistics, strict=True):
    np.testing.assert_array_equal(found, given)
  mean, found = moments.match_norm(
    [streams.Pair(dense, noise)], ALL[:1], (1,), *statistics
  )
  outputs = (np.asarray(noise) - np.asarray(mean)) / np.sqrt(
    np.asarray(found) + 1e-5
  )
  assert np.abs(outputs).max() < 0.01


@pytest.mark.parametrize("padding", [9, np.nan])
def test_what_a_mask_leaves_out_does_not_matter(pairs, padding):
  axis, values = pairs
  rng = np.random.default_rng(1)
  more = [
    streams.Pair(
      *(
        jnp.pad(x, ((0, 2 + i), (0, 0), (0, 0)), constant_values=padding)
        for x in p
      )
    )
    for i, p in enumerate(values)
  ]
  order = [rng.permutation(len(pair.dense)) for pair in more]
  mixed = [
    streams.Pair(*(x[at] for x in pair))
    for pair, at in zip(more, order, strict=True)
  ]
  masks = [jnp.asarray(at < 4) for at in order]
  for given, wanted in zip(
    (
      *moments.match_norm(mixed, masks, (axis,), MEAN, VAR),
      moments.match_bias(mixed, masks, (axis,), MEAN),
    ),
    (
      *moments.match_norm(values, ALL, (axis,), MEAN, VAR),
      moments.match_bias(values, ALL, (axis,), MEAN),
    ),
    strict=True,
  ):
    np.testing.assert_allclose(given, wanted, atol=1e-5)


@pytest.mark.parametrize("hidden", [-np.inf, -1e9, np.finfo(np.float32).min])
def test_a_bias_is_matched_beside_what_an_attention_hides(pairs, hidden):
  axis, values = pairs
  is_hidden = np.random.default_rng(2).random(values[0].dense.shape) < 0.3
  given = [
    streams.Pair(*(jnp.where(is_hidden, hidden, x) for x in pair))
    for pair in values
  ]
  found = moments.match_bias(given, ALL, (axis,), MEAN)
  missed = _rows([pair.dense - pair.quantized for pair in values], axis)
  shown = _rows([~is_hidden] * 2, axis)
  # Numbers, unlike -inf, count as entries that are right.
  count = shown.sum(0) if np.isinf(hidden) else len(shown)
  wanted = MEAN + (shown * missed).sum(0) / count
  np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_mask_is_of_the_first_axes_with_more_behind_them():
  mask = jnp.array([[True, False], [True, True], [False, False]])
  spread = sample_masks.spread_mask(mask, (3, 2, 4))
  np.testing.assert_array_equal(spread, np.repeat(mask[..., None], 4, 2))
  for shape in ((3, 2), (2, 3, 4), (3,)):
    assert sample_masks.spread_mask(mask, shape).all()

"""Matches mean and variance of a layer's values to those of the dense network.

Each channel is matched over all images and positions that count. A network that
was not changed keeps its variables.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pqf_jax.calibration import programs, streams
from pqf_jax.discovery import masks as sample_masks

# Against a division by zero, as a share of the norm's own variance.
_TINY = 1e-6
# Channels without a signal have variances near 0, whose shares float32 lacks;
# beside any epsilon this is 0 too.
_LEAST_VARIANCE = 1e-20


@functools.partial(programs.jit, static_argnames="axes")
def match_norm(
  pairs: Sequence[streams.Pair],
  masks: Sequence[jax.Array],
  axes: tuple[int, ...],
  mean: jax.Array,
  var: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Returns the statistics of a norm for the inputs of the quantized network.

  Args:
    pairs: inputs of the norm, one pair a batch.
    masks: what counts in each batch, see `masks.spread_mask`.
    axes: of the channels.
    mean: [C], the norm's statistics in the dense network.
    var: [C].

  Returns:
    (mean, var) with which the norm's outputs have the mean and the variance
    that they have in the dense network.
  """
  counted = [
    sample_masks.spread_mask(mask, pair.dense.shape)
    for pair, mask in zip(pairs, masks, strict=True)
  ]
  of_dense = _mean_and_variance([p.dense for p in pairs], counted, axes)
  of_quantized = _mean_and_variance([p.quantized for p in pairs], counted, axes)
  variance = jnp.maximum(var, _LEAST_VARIANCE)
  floor = _TINY * variance
  ratio = (of_quantized[1] + floor) / (of_dense[1] + floor)
  scale = jnp.sqrt(ratio)
  matched = mean * scale + (of_quantized[0] - of_dense[0] * scale)
  scaled = jnp.where(ratio == 1, var, variance * ratio)
  return matched.astype(mean.dtype), scaled.astype(var.dtype)


@functools.partial(programs.jit, static_argnames="axes")
def match_bias(
  pairs: Sequence[streams.Pair],
  masks: Sequence[jax.Array],
  axes: tuple[int, ...],
  bias: jax.Array,
) -> jax.Array:
  """Returns the bias with which the sums keep their means.

  Args:
    pairs: what the bias is added to, one pair a batch.
    masks: what counts in each batch, see `masks.spread_mask`.
    axes: of the channels.
    bias: of any shape, its axes longer than 1 in the order of `axes`.
  """
  missed, counted = zip(*map(_differences, pairs, masks), strict=True)
  mean, _ = _mean_and_variance(missed, counted, axes)
  return (bias + mean.reshape(bias.shape)).astype(bias.dtype)


def _differences(
  pair: streams.Pair, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns what the quantized network misses, and what of it counts.

  What an attention is not to see is -inf, or a number beside which all others
  are 0, in both networks: a difference of means would know nothing of the rest.
  """
  dense, quantized = (x.astype(jnp.float32) for x in pair)
  is_hidden = jnp.isneginf(dense) & jnp.isneginf(quantized)
  missed = jnp.where(dense == quantized, 0, dense - quantized)
  return missed, sample_masks.spread_mask(mask, dense.shape) & ~is_hidden


def _mean_and_variance(
  arrays: Sequence[jax.Array],
  counted: Sequence[jax.Array],
  axes: tuple[int, ...],
) -> tuple[jax.Array, jax.Array]:
  """Returns [C] each, over all batches; 0 where nothing counts."""
  parts = [_of_batch(*part, axes) for part in zip(arrays, counted, strict=True)]
  counts, means, variances = map(jnp.stack, zip(*parts, strict=True))
  shares = counts / jnp.maximum(counts.sum(0), 1)[None]
  mean = (shares * means).sum(0)
  spread = variances + jnp.square(means - mean[None])
  return mean, (shares * spread).sum(0)


def _of_batch(
  x: jax.Array, counted: jax.Array, axes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns how many count, their mean and variance, [C] each."""

  def to_rows(array: jax.Array) -> jax.Array:
    rows = jnp.moveaxis(array, axes, range(-len(axes), 0))
    return rows.reshape(-1, math.prod(x.shape[axis] for axis in axes))

  # Not as a product: padding may be NaN.
  rows = to_rows(jnp.where(counted, x, 0)).astype(jnp.float32)
  weights = to_rows(counted).astype(jnp.float32)
  counts = weights.sum(0)
  most = jnp.maximum(counts, 1)
  mean = rows.sum(0) / most
  square = jnp.square(rows - mean[None])
  return counts, mean, (weights * square).sum(0) / most

"""Matches mean and variance of a layer's values to those of the dense network.

Each channel is matched over all images and positions. A network that was not
changed keeps its variables.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pqf_jax.calibration import streams

# Against a division by zero, as a share of the norm's own variance.
_TINY = 1e-6
# Channels without a signal have variances near 0, whose shares float32 lacks;
# beside any epsilon this is 0 too.
_LEAST_VARIANCE = 1e-20


@functools.partial(jax.jit, static_argnames="axes")
def match_norm(
  pairs: Sequence[streams.Pair],
  axes: tuple[int, ...],
  mean: jax.Array,
  var: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Returns the statistics of a norm for the inputs of the quantized network.

  Args:
    pairs: inputs of the norm, one pair a batch.
    axes: of the channels.
    mean: [C], the norm's statistics in the dense network.
    var: [C].

  Returns:
    (mean, var) with which the norm's outputs have the mean and the variance
    that they have in the dense network.
  """
  of_dense = _mean_and_variance([pair.dense for pair in pairs], axes)
  of_quantized = _mean_and_variance([pair.quantized for pair in pairs], axes)
  variance = jnp.maximum(var, _LEAST_VARIANCE)
  floor = _TINY * variance
  ratio = (of_quantized[1] + floor) / (of_dense[1] + floor)
  scale = jnp.sqrt(ratio)
  matched = mean * scale + (of_quantized[0] - of_dense[0] * scale)
  scaled = jnp.where(ratio == 1, var, variance * ratio)
  return matched.astype(mean.dtype), scaled.astype(var.dtype)


@functools.partial(jax.jit, static_argnames="axes")
def match_bias(
  pairs: Sequence[streams.Pair], axes: tuple[int, ...], bias: jax.Array
) -> jax.Array:
  """Returns the bias with which the sums keep their means.

  Args:
    pairs: what the bias is added to, one pair a batch.
    axes: of the channels.
    bias: of any shape, its axes longer than 1 in the order of `axes`.
  """
  of_dense, _ = _mean_and_variance([pair.dense for pair in pairs], axes)
  of_quantized, _ = _mean_and_variance([pair.quantized for pair in pairs], axes)
  missed = (of_dense - of_quantized).reshape(bias.shape)
  return (bias + missed).astype(bias.dtype)


def _mean_and_variance(
  arrays: Sequence[jax.Array], axes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
  """Returns [C] each, over batches of equal size."""
  sums = [_of_batch(array, axes) for array in arrays]
  means, variances = map(jnp.stack, zip(*sums, strict=True))
  mean = means.mean(0)
  return mean, (variances + jnp.square(means - mean[None])).mean(0)


def _of_batch(
  x: jax.Array, axes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
  rows = jnp.moveaxis(x, axes, range(-len(axes), 0))
  rows = rows.reshape(-1, math.prod(x.shape[axis] for axis in axes))
  rows = rows.astype(jnp.float32)
  mean = rows.mean(0)
  return mean, jnp.square(rows - mean[None]).mean(0)

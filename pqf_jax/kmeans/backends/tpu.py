"""The form of TPUs: two kernels, of which the sums are a matrix product too."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pqf_jax.kmeans import assignment, batching
from pqf_jax.kmeans.backends import base, tpu_kernels
from pqf_jax.numerics import bf16_split, segments


class _Digits(NamedTuple):
  """What the kernels for a TPU read.

  Attributes:
    points: for their scales.
    vectors: [B, depth, 1024] bfloat16, from `pieces`.
    digits: [B, 4 D + 4, 1024] bfloat16: the lower 8 bits of every word, then
      the upper ones.
  """

  points: base.Points
  vectors: jax.Array
  digits: jax.Array


def _digits(points: base.Points) -> _Digits:
  # Words along the second axis: a short last one would be padded to 128.
  layers = points.places.layers
  fractions = jnp.stack(points.columns, 1) / points.scale[layers][:, :, None]
  pairs = jnp.stack(segments.split_words(fractions), axis=2)
  norms = segments.to_word(points.norms / points.norm_scale[layers])
  words = jnp.concatenate(
    [
      pairs.reshape(norms.shape[0], -1, norms.shape[1]),
      norms[:, None].astype(jnp.int32),
      batching.inside(points.places)[:, None].astype(jnp.int32),
    ],
    axis=1,
  )
  digits = segments.to_digits(words, axis=1)
  vectors = bf16_split.of_vectors(points.columns)
  return _Digits(points, vectors, digits)


@jax.custom_batching.sequential_vmap
def _tpu_nearest(*arguments: jax.Array) -> jax.Array:
  return tpu_kernels.nearest(*arguments)


def _product_codes(prepared: _Digits, codebooks: jax.Array) -> jax.Array:
  return _tpu_nearest(
    prepared.vectors,
    assignment.tables(codebooks),
    prepared.points.places.layers,
  )


def _product_sums(
  prepared: _Digits, codes: jax.Array, num_codes: int, most_rows: int
) -> jax.Array:
  del most_rows  # `by_platform` has seen to it.
  places = prepared.points.places

  @jax.custom_batching.sequential_vmap
  def sums(*arrays: jax.Array) -> jax.Array:
    return tpu_kernels.sums(*arrays, places.sizes.size, num_codes)

  return sums(prepared.digits, codes, places.layers)


def _product_totals(prepared: _Digits, integers: jax.Array) -> base.Totals:
  words = segments.from_digits(jnp.moveaxis(integers, 1, 2), axis=2)
  return base.word_totals(prepared.points, segments.merged(*words))


PRODUCTS = base.Form(
  _digits,
  _product_codes,
  _product_sums,
  _product_totals,
  base.without_kernel,
)
"""Both by kernels; transfers as on any platform."""

"""The backend of CPUs, and of accelerators without one of their own."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pqf_jax.kmeans import assignment, batching
from pqf_jax.kmeans.backends import base
from pqf_jax.numerics import segments


def _words(points: base.Points) -> jax.Array:
  """Returns the words of x, |x|^2 and 1, [B, 1024, 2 D + 2] int32."""
  layers = points.layout.layers
  fractions = jnp.stack(points.columns, 2) / points.scale[layers][:, None]
  norm_fractions = points.norms / points.norm_scale[layers]
  return jnp.concatenate(
    [
      segments.to_words(fractions),
      segments.to_word(norm_fractions)[:, :, None].astype(jnp.int32),
      batching.mask(points.layout)[:, :, None].astype(jnp.int32),
    ],
    axis=2,
  )


def _codes(points: base.Points, codebooks: jax.Array) -> jax.Array:
  return assignment.nearest_centroid(
    points.columns, codebooks, points.layout.layers
  )


def _sums(
  points: base.Points, codes: jax.Array, num_codes: int, most_rows: int
) -> tuple[jax.Array, jax.Array]:
  def words_of_some(cut: batching.Cut) -> tuple[jax.Array, jax.Array]:
    some = points.cut(cut)
    owners = cut(codes) + some.layout.layers[:, None] * num_codes
    return _words(some), owners

  num_segments = points.layout.sizes.size * num_codes
  return batching.sums_by_parts(
    words_of_some, len(codes), num_segments, most_rows
  )


def _totals(
  points: base.Points, integers: tuple[jax.Array, jax.Array]
) -> base.Totals:
  sums = segments.merge(*integers)
  num_layers, num_words = points.scale.shape[0], sums.shape[1]
  return base.totals_of_words(points, sums.reshape(num_layers, -1, num_words))


BACKEND = base.Backend(lambda points: points, _codes, _sums, _totals)

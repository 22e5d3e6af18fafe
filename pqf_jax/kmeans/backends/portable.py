"""The backend of CPUs, and of accelerators without one of their own."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pqf_jax.kmeans import assignment, batching
from pqf_jax.kmeans.backends import base
from pqf_jax.numerics import segments


class _Prepared(NamedTuple):
  """The points, and [B * 1024, 2 D + 2] int32 words of x, |x|^2 and 1."""

  points: base.Points
  words: jax.Array


def _prepare(points: base.Points) -> _Prepared:
  layers = points.layout.layers
  fractions = jnp.stack(points.columns, 2) / points.scale[layers][:, None]
  norm_fractions = points.norms / points.norm_scale[layers]
  words = jnp.concatenate(
    [
      segments.to_words(fractions),
      segments.to_word(norm_fractions)[:, :, None].astype(jnp.int32),
      batching.mask(points.layout)[:, :, None].astype(jnp.int32),
    ],
    axis=2,
  )
  return _Prepared(points, words.reshape(-1, words.shape[2]))


def _codes(prepared: _Prepared, codebooks: jax.Array) -> jax.Array:
  columns, layers = prepared.points.columns, prepared.points.layout.layers
  return assignment.nearest_centroid(columns, codebooks, layers)


def _sums(
  prepared: _Prepared, codes: jax.Array, num_codes: int, most_rows: int
) -> tuple[jax.Array, jax.Array]:
  layout = prepared.points.layout
  owners = codes + layout.layers[:, None] * num_codes
  return segments.integer_sums(
    prepared.words,
    owners.reshape(-1),
    layout.sizes.size * num_codes,
    most_added=most_rows,
  )


def _totals(
  prepared: _Prepared, integers: tuple[jax.Array, jax.Array]
) -> base.Totals:
  points = prepared.points
  sums = segments.merge(*integers)
  num_layers, num_words = points.scale.shape[0], sums.shape[1]
  return base.totals_of_words(points, sums.reshape(num_layers, -1, num_words))


BACKEND = base.Backend(_prepare, _codes, _sums, _totals)

"""The form of CPUs, and of accelerators without another one.

Passes with a running minimum or a fused reduction, and a scatter of words.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pqf_jax.kmeans import assignment, batching
from pqf_jax.kmeans.backends import base
from pqf_jax.numerics import segments


class _Words(NamedTuple):
  """The points, and [B * 1024, 2 D + 2] int32 words of x, |x|^2 and 1."""

  points: base.Points
  words: jax.Array


def _words(points: base.Points) -> _Words:
  layers = points.places.layers
  fractions = jnp.stack(points.columns, 2) / points.scale[layers][:, None]
  norm_fractions = points.norms / points.norm_scale[layers]
  words = jnp.concatenate(
    [
      segments.to_words(fractions),
      segments.to_word(norm_fractions)[:, :, None].astype(jnp.int32),
      batching.inside(points.places)[:, :, None].astype(jnp.int32),
    ],
    axis=2,
  )
  return _Words(points, words.reshape(-1, words.shape[2]))


def _scattered_codes(prepared: _Words, codebooks: jax.Array) -> jax.Array:
  columns, layers = prepared.points.columns, prepared.points.places.layers
  return assignment.nearest_centroid(columns, codebooks, layers)


def _scattered_sums(
  prepared: _Words, codes: jax.Array, num_codes: int, most_rows: int
) -> tuple[jax.Array, jax.Array]:
  places = prepared.points.places
  owners = codes + places.layers[:, None] * num_codes
  return segments.integer_sums(
    prepared.words,
    owners.reshape(-1),
    places.sizes.size * num_codes,
    most_added=most_rows,
  )


def _scattered_totals(
  prepared: _Words, integers: tuple[jax.Array, jax.Array]
) -> base.Totals:
  points = prepared.points
  sums = segments.merged(*integers)
  num_layers, num_words = points.scale.shape[0], sums.shape[1]
  return base.word_totals(points, sums.reshape(num_layers, -1, num_words))


SCATTERED = base.Form(
  _words,
  _scattered_codes,
  _scattered_sums,
  _scattered_totals,
  base.without_kernel,
)
"""For any platform."""

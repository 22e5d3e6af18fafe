"""The backend of NVIDIA Hopper and later: kernels for all parts of a step.

A codebook has to fit into the shared memory of a processor.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pqf_jax.kmeans import assignment, batching
from pqf_jax.kmeans.backends import base, hopper_nearest, hopper_sums
from pqf_jax.numerics import bf16_split, segments


class _Prepared(NamedTuple):
  """The operands of the kernels.

  Attributes:
    vectors: [B, depth, 1024] bfloat16, from `bf16_split.split_vectors`.
    columns: D + 2 arrays [B, 1024] float32: x, |x|^2 and 1.
    layers: [B] int32.
    units: [L, D + 2] float32, of `hopper_sums.sums`.
  """

  vectors: jax.Array
  columns: tuple[jax.Array, ...]
  layers: jax.Array
  units: jax.Array


def _prepare(points: base.Points) -> _Prepared:
  layout = points.layout
  # Half the sub-vectors of a layer, all at its largest entry, fit into int32;
  # more cannot be there at once, for the mean is 0. Norms may all be large.
  room = jnp.maximum(segments.power_of_two(layout.sizes) * 2.0**-17, 1)[:, None]
  largest = jnp.concatenate([points.scale, 2 * points.norm_scale], axis=1)
  units = jnp.minimum(2.0**14 / (largest * room), 2.0**100)
  ones = batching.mask(layout).astype(jnp.float32)
  return _Prepared(
    vectors=bf16_split.split_vectors(points.columns),
    columns=(*points.columns, points.norms, ones),
    layers=layout.layers,
    units=jnp.pad(units, ((0, 0), (0, 1)), constant_values=1),
  )


def _codes(prepared: _Prepared, codebooks: jax.Array) -> jax.Array:
  return hopper_nearest.nearest(
    prepared.vectors, assignment.score_tables(codebooks), prepared.layers
  )


def _sums(
  prepared: _Prepared, codes: jax.Array, num_codes: int, most_rows: int
) -> jax.Array:
  del most_rows  # The units are chosen so that nothing overflows.
  return hopper_sums.sums(
    prepared.columns,
    codes,
    prepared.layers,
    prepared.units,
    num_codes,
    num_coarse=2,
  )


def _totals(prepared: _Prepared, integers: jax.Array) -> base.Totals:
  # Each integer gets one representation, in whatever parts it was added up.
  low, high = integers[:, 0::2], integers[:, 1::2]
  high = (high + (low >> 15)).astype(jnp.float32)
  low = (low & 0x7FFF).astype(jnp.float32)
  sums = (high + low * segments.LOW_UNIT) * (1 / prepared.units)[:, :, None]
  return base.Totals(jnp.moveaxis(sums[:, :-2], 1, 2), sums[:, -2], sums[:, -1])


def _split(points: base.Points) -> jax.Array:
  return bf16_split.split_vectors((*points.columns, points.norms))


def _dot(left: jax.Array, right: jax.Array) -> jax.Array:
  # XLA:GPU adds each row in its order, whatever the shape (tests/kmeans/
  # backends/test_hopper.py); exact products would cost a program more a step.
  return (left * right).sum(axis=-1)


BACKEND = base.Backend(
  _prepare, _codes, _sums, _totals, _split, unroll=4, dot=_dot
)

BACKEND_WITHOUT_HARTIGAN = BACKEND._replace(split=lambda points: None)
"""For codebooks that fit into shared memory, but not with one more number to
each centroid."""

"""The form of NVIDIA Hopper and later: kernels, if a codebook fits in.

It has to fit into the shared memory of a processor.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pqf_jax.kmeans import assignment, batching
from pqf_jax.kmeans.backends import base, hopper_sums
from pqf_jax.numerics import bf16_split, segments


class _Operands(NamedTuple):
  """What the kernels for a GPU read.

  Attributes:
    vectors: [B, depth, 1024] bfloat16, from `pieces`.
    columns: D + 2 arrays [B, 1024] float32: x, |x|^2 and 1.
    layers: [B] int32.
    units: [L, D + 2] float32, of `sums_gpu`.
  """

  vectors: jax.Array
  columns: tuple[jax.Array, ...]
  layers: jax.Array
  units: jax.Array


def _operands(points: base.Points) -> _Operands:
  places = points.places
  # Half the sub-vectors of a layer, all at its largest entry, fit into int32;
  # more cannot be there at once, for the mean is 0. Norms may all be large.
  room = jnp.maximum(segments.power_of_two(places.sizes) * 2.0**-17, 1)[:, None]
  largest = jnp.concatenate([points.scale, 2 * points.norm_scale], axis=1)
  units = jnp.minimum(2.0**14 / (largest * room), 2.0**100)
  inside = batching.inside(places).astype(jnp.float32)
  return _Operands(
    vectors=bf16_split.of_vectors(points.columns),
    columns=(*points.columns, points.norms, inside),
    layers=places.layers,
    units=jnp.pad(units, ((0, 0), (0, 1)), constant_values=1),
  )


def _kernel_codes(prepared: _Operands, codebooks: jax.Array) -> jax.Array:
  return assignment.kernel(
    prepared.vectors, assignment.tables(codebooks), prepared.layers
  )


def _kernel_sums(
  prepared: _Operands, codes: jax.Array, num_codes: int, most_rows: int
) -> jax.Array:
  del most_rows  # The units see to it that nothing overflows.

  @jax.custom_batching.sequential_vmap
  def sums(*columns: jax.Array) -> jax.Array:
    *columns, codes, layers, units = columns
    return hopper_sums.sums(
      columns, codes, layers, units, num_codes, num_coarse=2
    )

  return sums(*prepared.columns, codes, prepared.layers, prepared.units)


def _kernel_totals(prepared: _Operands, integers: jax.Array) -> base.Totals:
  # One form of every integer, however its parts were added up.
  low, high = integers[:, 0::2], integers[:, 1::2]
  high = (high + (low >> 15)).astype(jnp.float32)
  low = (low & 0x7FFF).astype(jnp.float32)
  sums = (high + low * segments.LOW_UNIT) * (1 / prepared.units)[:, :, None]
  return base.Totals(jnp.moveaxis(sums[:, :-2], 1, 2), sums[:, -2], sums[:, -1])


def _candidates(points: base.Points) -> base.Candidates:
  columns = *points.columns, points.norms
  return base.Candidates(points, bf16_split.of_vectors(columns))


def _dot(left: jax.Array, right: jax.Array) -> jax.Array:
  # XLA:GPU adds each row in its order, whatever the shape (tests/ops/
  # test_kernels_gpu.py); exact products would cost a program more a step.
  return (left * right).sum(axis=-1)


KERNELS = base.Form(
  _operands,
  _kernel_codes,
  _kernel_sums,
  _kernel_totals,
  _candidates,
  unroll=4,
  dot=_dot,
)
"""Nearest centroids, the cheapest other cluster, and sums by kernels."""

TWO_KERNELS = KERNELS._replace(candidates=base.without_kernel)
"""The same where a codebook fits into shared memory, but not with one more
number each."""

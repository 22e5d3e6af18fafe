"""What a step of k-means sums up, by platform.

A step needs of every cluster the sum of its sub-vectors, of their squared
norms, and their number. All are summed in integers (`pqf_jax.ops.segments`), so
that neither the order nor the number of devices matters. A form is how one
platform gets them:

- CPUs: passes with a running minimum, a scatter of integer words.
- NVIDIA Hopper and later: two kernels, if a codebook fits into shared memory.
- TPUs: two kernels; the sums are a matrix product too.
- other accelerators: one fused reduction, a scatter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pqf_jax.ops import nearest, packing, pieces, segments, transfers
from pqf_jax.ops.kernels import clusters_tpu, nearest_gpu, sums_gpu

Tree = Any


class Points(NamedTuple):
  """The sub-vectors, less the mean of their layer.

  Attributes:
    columns: D arrays [B, 1024] float32, 0 where there is no sub-vector.
    norms: [B, 1024] float32, their squared norms.
    places: the layer of each block, and how full it is.
    scale: [L, D] float32, powers of two that exceed a layer's entries.
    norm_scale: [L, 1] float32, the same of its norms.
  """

  columns: tuple[jax.Array, ...]
  norms: jax.Array
  places: packing.Places
  scale: jax.Array
  norm_scale: jax.Array

  def first(self, num_blocks: int) -> Points:
    """Those of the first blocks."""
    return self._replace(
      columns=tuple(column[:num_blocks] for column in self.columns),
      norms=self.norms[:num_blocks],
      places=self.places._replace(
        layers=self.places.layers[:num_blocks],
        filled=self.places.filled[:num_blocks],
      ),
    )


class Totals(NamedTuple):
  """Sums over each cluster, float32.

  Attributes:
    vectors: [L, K, D].
    norms: [L, K], of squared norms.
    counts: [L, K].
  """

  vectors: jax.Array
  norms: jax.Array
  counts: jax.Array


class Form(NamedTuple):
  """How one platform does it.

  Attributes:
    prepare: (points) -> what the others need of the points, made once.
    codes: (prepared, codebooks [L, K, D]) -> [B, 1024] int32.
    sums: (prepared, codes, K, most rows of a layer on this device) -> whole
      numbers, to be added up over devices.
    totals: (prepared, those numbers) -> Totals.
    candidates: (points) -> what `transferred` needs of them, made once.
    transferred: (candidates, centroids [L, K, D], counts [L, K], codes, weight)
      -> codes, of `transfers`.
    unroll: steps of a turn of the loop, which itself costs time on a GPU.
  """

  prepare: Callable[[Points], Tree]
  codes: Callable[[Tree, jax.Array], jax.Array]
  sums: Callable[[Tree, jax.Array, int, int], Tree]
  totals: Callable[[Tree, Tree], Totals]
  candidates: Callable[[Points], Tree]
  transferred: Callable[
    [Tree, jax.Array, jax.Array, jax.Array, float], jax.Array
  ]
  unroll: int = 1


def by_platform(
  run: Callable[..., Tree],
  *arguments: Tree,
  length: int,
  num_codes: int,
  most_rows: int,
) -> Tree:
  """Returns `run(form, *arguments)` with the form of the platform.

  Args:
    run: traced once a platform that the program may be compiled for.
    *arguments: trees of arrays.
    length: D.
    num_codes: K.
    most_rows: of the layer that has most, padding included, on a device.
  """
  forms = {"cpu": _SCATTERED, "default": _SCATTERED}
  if most_rows <= clusters_tpu.MOST_ROWS:
    forms["tpu"] = _PRODUCTS
  if (
    nearest_gpu.is_available()
    and nearest_gpu.fits(length, num_codes)
    and sums_gpu.fits(length + 2, num_codes)
  ):
    by_kernel = nearest_gpu.fits(length + 1, num_codes)
    forms["cuda"] = _KERNELS if by_kernel else _TWO_KERNELS
  runs = {name: functools.partial(run, form) for name, form in forms.items()}
  return lax.platform_dependent(*arguments, **runs)


class _Words(NamedTuple):
  """The points, and [B * 1024, 2 D + 2] int32 words of x, |x|^2 and 1."""

  points: Points
  words: jax.Array


def _words(points: Points) -> _Words:
  layers = points.places.layers
  fractions = jnp.stack(points.columns, 2) / points.scale[layers][:, None]
  norm_fractions = points.norms / points.norm_scale[layers]
  words = jnp.concatenate(
    [
      segments.to_words(fractions),
      segments.to_word(norm_fractions)[:, :, None].astype(jnp.int32),
      packing.inside(points.places)[:, :, None].astype(jnp.int32),
    ],
    axis=2,
  )
  return _Words(points, words.reshape(-1, words.shape[2]))


def _scattered_codes(prepared: _Words, codebooks: jax.Array) -> jax.Array:
  columns, layers = prepared.points.columns, prepared.points.places.layers
  return nearest.nearest_centroid(columns, codebooks, layers)


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
) -> Totals:
  points = prepared.points
  sums = segments.merged(*integers)
  num_layers, num_words = points.scale.shape[0], sums.shape[1]
  return _word_totals(points, sums.reshape(num_layers, -1, num_words))


def _word_totals(points: Points, sums: jax.Array) -> Totals:
  """From the sums of the words, [L, K, 2 D + 2] float32."""
  return Totals(
    vectors=segments.from_words(sums[:, :, :-2]) * points.scale[:, None],
    norms=sums[:, :, -2] * (points.norm_scale * segments.LOW_UNIT),
    counts=sums[:, :, -1],
  )


def _points(points: Points) -> Points:
  return points


def _transferred(
  points: Points,
  centroids: jax.Array,
  counts: jax.Array,
  codes: jax.Array,
  weight: float,
) -> jax.Array:
  return transfers.transfer(
    points.columns,
    centroids,
    counts,
    points.places.layers,
    codes,
    weight=weight,
  )


_SCATTERED = Form(
  _words,
  _scattered_codes,
  _scattered_sums,
  _scattered_totals,
  _points,
  _transferred,
)


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


def _operands(points: Points) -> _Operands:
  places = points.places
  # Half the sub-vectors of a layer, all at its largest entry, fit into int32;
  # more cannot be there at once, for the mean is 0. Norms may all be large.
  room = jnp.maximum(segments.power_of_two(places.sizes) * 2.0**-17, 1)[:, None]
  largest = jnp.concatenate([points.scale, 2 * points.norm_scale], axis=1)
  units = jnp.minimum(2.0**14 / (largest * room), 2.0**100)
  inside = packing.inside(places).astype(jnp.float32)
  return _Operands(
    vectors=pieces.of_vectors(points.columns),
    columns=(*points.columns, points.norms, inside),
    layers=places.layers,
    units=jnp.pad(units, ((0, 0), (0, 1)), constant_values=1),
  )


def _kernel_codes(prepared: _Operands, codebooks: jax.Array) -> jax.Array:
  return nearest.kernel(
    prepared.vectors, nearest.tables(codebooks), prepared.layers
  )


def _kernel_sums(
  prepared: _Operands, codes: jax.Array, num_codes: int, most_rows: int
) -> jax.Array:
  del most_rows  # The units see to it that nothing overflows.

  @jax.custom_batching.sequential_vmap
  def sums(*columns: jax.Array) -> jax.Array:
    *columns, codes, layers, units = columns
    return sums_gpu.sums(columns, codes, layers, units, num_codes, num_coarse=2)

  return sums(*prepared.columns, codes, prepared.layers, prepared.units)


def _kernel_totals(prepared: _Operands, integers: jax.Array) -> Totals:
  # One form of every integer, however its parts were added up.
  low, high = integers[:, 0::2], integers[:, 1::2]
  high = (high + (low >> 15)).astype(jnp.float32)
  low = (low & 0x7FFF).astype(jnp.float32)
  sums = (high + low * segments.LOW_UNIT) * (1 / prepared.units)[:, :, None]
  return Totals(jnp.moveaxis(sums[:, :-2], 1, 2), sums[:, -2], sums[:, -1])


class _Candidates(NamedTuple):
  """What transfers by a kernel read: `pieces` of x and |x|^2, and x."""

  vectors: jax.Array
  points: Points


def _candidates(points: Points) -> _Candidates:
  columns = *points.columns, points.norms
  return _Candidates(pieces.of_vectors(columns), points)


def _kernel_transferred(
  candidates: _Candidates,
  centroids: jax.Array,
  counts: jax.Array,
  codes: jax.Array,
  weight: float,
) -> jax.Array:
  return transfers.transfer_by_kernel(
    candidates.vectors,
    candidates.points.columns,
    centroids,
    counts,
    candidates.points.places.layers,
    codes,
    weight=weight,
  )


_KERNELS = Form(
  _operands,
  _kernel_codes,
  _kernel_sums,
  _kernel_totals,
  _candidates,
  _kernel_transferred,
  unroll=4,
)
# A codebook may fit into shared memory, and with one more number each not.
_TWO_KERNELS = _KERNELS._replace(candidates=_points, transferred=_transferred)


class _Digits(NamedTuple):
  """What the kernels for a TPU read.

  Attributes:
    points: for their scales.
    vectors: [B, depth, 1024] bfloat16, from `pieces`.
    digits: [B, 4 D + 4, 1024] bfloat16: the lower 8 bits of every word, then
      the upper ones.
  """

  points: Points
  vectors: jax.Array
  digits: jax.Array


def _digits(points: Points) -> _Digits:
  # Words along the second axis: a short last one would be padded to 128.
  layers = points.places.layers
  fractions = jnp.stack(points.columns, 1) / points.scale[layers][:, :, None]
  pairs = jnp.stack(segments.split_words(fractions), axis=2)
  norms = segments.to_word(points.norms / points.norm_scale[layers])
  words = jnp.concatenate(
    [
      pairs.reshape(norms.shape[0], -1, norms.shape[1]),
      norms[:, None].astype(jnp.int32),
      packing.inside(points.places)[:, None].astype(jnp.int32),
    ],
    axis=1,
  )
  digits = segments.to_digits(words, axis=1)
  vectors = pieces.of_vectors(points.columns)
  return _Digits(points, vectors, digits)


@jax.custom_batching.sequential_vmap
def _tpu_nearest(*arguments: jax.Array) -> jax.Array:
  return clusters_tpu.nearest(*arguments)


def _product_codes(prepared: _Digits, codebooks: jax.Array) -> jax.Array:
  return _tpu_nearest(
    prepared.vectors,
    nearest.tables(codebooks),
    prepared.points.places.layers,
  )


def _product_sums(
  prepared: _Digits, codes: jax.Array, num_codes: int, most_rows: int
) -> jax.Array:
  del most_rows  # `by_platform` has seen to it.
  places = prepared.points.places

  @jax.custom_batching.sequential_vmap
  def sums(*arrays: jax.Array) -> jax.Array:
    return clusters_tpu.sums(*arrays, places.sizes.size, num_codes)

  return sums(prepared.digits, codes, places.layers)


def _product_totals(prepared: _Digits, integers: jax.Array) -> Totals:
  words = segments.from_digits(jnp.moveaxis(integers, 1, 2), axis=2)
  return _word_totals(prepared.points, segments.merged(*words))


_PRODUCTS = Form(
  _digits,
  _product_codes,
  _product_sums,
  _product_totals,
  _points,
  _transferred,
)

"""The loop of SR-C k-means over the sub-vectors of one or several layers.

Layers share one program: their sub-vectors are cut into blocks of 1024, a block
belongs to one layer, and what pads a layer's last block has weight 0. All sums
are exact (`pqf_jax.ops.segments`), so that a layer's result is the same, to the
bit, whichever layers it is computed with and on however many devices.

Bits are also lost where XLA fuses a product with the addition behind it, or
does not: a choice that may depend on the shapes. So the mean, the centred data
and the loop are programs of their own, and the product that adds noise to a
centroid is exact.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from pqf_jax.ops import clusters, nearest, packing, reseeding

Rule = Callable[[reseeding.Clusters], reseeding.Proposal]


class Prepared(NamedTuple):
  """What the loop needs, computed once.

  Attributes:
    points: the sub-vectors, less `offset`.
    offset: [L, D] float32, the data means.
    squares: [L, D] float32, sums of x^2.
  """

  points: clusters.Points
  offset: jax.Array
  squares: jax.Array


class Options(NamedTuple):
  """What is known when the programs are compiled.

  Attributes:
    most_rows: rows of the layer that has most, padding included, on a device.
    reseed: the rule that places the centroids of empty clusters.
    axis_name: of the devices over which the blocks are spread, or None.
  """

  most_rows: int
  reseed: Rule = reseeding.split_worst
  axis_name: str | None = None


class Fitted(NamedTuple):
  """The result of `fit` for L layers.

  Attributes:
    codebooks: [L, K, D] float32.
    codes: [B, 1024] int32.
    distortion: [L, T + 1] float32, squared error of a sub-vector.
    variance: [L] float32, of the entries of all sub-vectors.
  """

  codebooks: jax.Array
  codes: jax.Array
  distortion: jax.Array
  variance: jax.Array


def fit(
  packed: packing.Packed,
  starts: jax.Array,
  schedule: jax.Array,
  normals: jax.Array,
  *,
  options: Options,
  mesh: Mesh | None = None,
) -> Fitted:
  """Runs one step of k-means for every entry of `schedule`.

  Deterministic; all randomness is in `starts` and `normals`.

  Args:
    packed: the sub-vectors.
    starts: [L, K, D] float32, the first centroids.
    schedule: [T] float32, a_t of `pqf_jax.ops.kmeans`.
    normals: [T, L, K, D] bfloat16 draws of a standard normal.
    options: what is compiled into the programs.
    mesh: devices over which the blocks of each layer are spread, or None.

  Returns:
    Codebooks, codes that match them, and the error of every step.
  """
  if mesh is None:
    offsets, prepare, loop = (
      functools.partial(function, options=options)
      for function in (_offsets, _prepared, _loop)
    )
  else:
    offsets, prepare, loop = _on_devices(mesh, options)
  prepared = prepare(packed, offsets(packed))
  return loop(prepared, starts, schedule, normals)


@functools.partial(jax.jit, static_argnames="options")
def _offsets(packed: packing.Packed, *, options: Options) -> jax.Array:
  """The means of the layers, [L, D]."""
  totals = packing.totals(
    packed.places,
    packed.blocks,
    most_rows=options.most_rows,
    axis_name=options.axis_name,
  )
  return totals / packed.places.sizes[:, None]


@functools.partial(jax.jit, static_argnames="options")
def _prepared(
  packed: packing.Packed, offset: jax.Array, *, options: Options
) -> Prepared:
  # The data mean is moved to 0: the scores of `nearest` cancel less there.
  vectors = packed.blocks - offset[packed.places.layers][:, None]
  vectors = jnp.where(packing.inside(packed.places)[:, :, None], vectors, 0)
  norms = jnp.square(vectors).sum(axis=2, keepdims=True)
  scales = functools.partial(
    packing.scales, packed.places, axis_name=options.axis_name
  )
  squares = packing.totals(
    packed.places,
    jnp.square(vectors),
    most_rows=options.most_rows,
    axis_name=options.axis_name,
  )
  return Prepared(
    points=clusters.Points(
      columns=nearest.split_columns(vectors),
      norms=norms[:, :, 0],
      places=packed.places,
      scale=scales(vectors),
      norm_scale=scales(norms),
    ),
    offset=offset,
    squares=squares,
  )


@functools.partial(jax.jit, static_argnames="options")
def _loop(
  prepared: Prepared,
  starts: jax.Array,
  schedule: jax.Array,
  normals: jax.Array,
  *,
  options: Options,
) -> Fitted:
  _, num_codes, length = starts.shape
  run = functools.partial(_iterate, options=options)
  return clusters.by_platform(
    run,
    prepared,
    starts,
    schedule,
    normals,
    length=length,
    num_codes=num_codes,
    most_rows=options.most_rows,
  )


def _iterate(
  form: clusters.Form,
  prepared: Prepared,
  starts: jax.Array,
  schedule: jax.Array,
  normals: jax.Array,
  *,
  options: Options,
) -> Fitted:
  points, squares = prepared.points, prepared.squares
  sizes = points.places.sizes[:, None]
  deviation = jnp.sqrt(squares / jnp.maximum(sizes - 1, 1))
  operands = form.prepare(points)

  def step(
    codebooks: jax.Array, inputs: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, jax.Array]:
    amount, normal = inputs
    integers = form.sums(operands, codebooks, options.most_rows)
    if options.axis_name is not None:
      integers = lax.psum(integers, options.axis_name)
    totals = form.totals(operands, integers)
    found, gains = _clusters(codebooks, totals)
    proposal = jax.vmap(options.reseed)(found)
    noise = amount * deviation[:, None]
    noise = noise / jnp.sqrt(proposal.counts)[:, :, None]
    # 16 bits times the 8 of a bfloat16: an exact product.
    noise = lax.reduce_precision(jnp.maximum(noise, proposal.spread), 8, 15)
    moved = proposal.centroids + noise * normal.astype(jnp.float32)
    return moved, gains

  start = starts - prepared.offset[:, None]
  codebooks, trace = lax.scan(
    step, start, (schedule, normals), unroll=form.unroll
  )
  codes = form.codes(operands, codebooks)
  residual = jnp.stack(points.columns, 2)
  residual = residual - codebooks[points.places.layers[:, None], codes]
  inside = packing.inside(points.places)[:, :, None]
  error = jnp.square(jnp.where(inside, residual, 0))
  error = packing.totals(
    points.places,
    error.sum(axis=2, keepdims=True),
    most_rows=options.most_rows,
    axis_name=options.axis_name,
  )
  # Rounding may take the error of a perfect fit below 0.
  trace = squares.sum(axis=1)[None] + trace.sum(axis=2)
  trace = [jnp.maximum(trace.T, 0), error]
  spread = prepared.offset.var(axis=1)
  return Fitted(
    codebooks=codebooks + prepared.offset[:, None],
    codes=codes,
    distortion=jnp.concatenate(trace, axis=1) / sizes,
    variance=(squares / sizes).mean(axis=1) + spread,
  )


def _clusters(
  codebooks: jax.Array, totals: clusters.Totals
) -> tuple[reseeding.Clusters, jax.Array]:
  """The clusters, and by layer the sum of |x - c|^2 less that of |x|^2, [L]."""
  counts = totals.counts
  gains = counts * jnp.square(codebooks).sum(axis=2)
  gains = gains - 2 * (codebooks * totals.vectors).sum(axis=2)
  errors = jnp.maximum(totals.norms + gains, 0)
  found = reseeding.Clusters(
    codebook=codebooks,
    means=totals.vectors / jnp.maximum(counts, 1)[:, :, None],
    counts=counts,
    errors=lax.reduce_precision(errors, 8, 9),
  )
  return found, gains


_SPREAD = PartitionSpec("blocks")
_SAME = PartitionSpec()
_PLACES = packing.Places(_SPREAD, _SPREAD, _SAME)
_PACKED = packing.Packed(_SPREAD, _PLACES)
_POINTS = clusters.Points(_SPREAD, _SPREAD, _PLACES, _SAME, _SAME)
_PREPARED = Prepared(_POINTS, _SAME, _SAME)
_SPECS = {
  _offsets: ((_PACKED,), _SAME),
  _prepared: ((_PACKED, _SAME), _PREPARED),
  _loop: (
    (_PREPARED, _SAME, _SAME, _SAME),
    Fitted(_SAME, _SPREAD, _SAME, _SAME),
  ),
}
"""(arguments, results) of each program on several devices."""


@functools.cache
def _on_devices(mesh: Mesh, options: Options) -> tuple[Callable[..., Any], ...]:
  """The programs, spread over all devices of `mesh`."""
  options = options._replace(axis_name="blocks")
  devices = Mesh(mesh.devices.reshape(-1), ("blocks",))
  return tuple(
    jax.jit(
      jax.shard_map(
        functools.partial(function, options=options),
        mesh=devices,
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=False,
      )
    )
    for function, (in_specs, out_specs) in _SPECS.items()
  )

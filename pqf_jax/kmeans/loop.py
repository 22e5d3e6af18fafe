"""The loop of SR-C k-means over a batch, and one step of it.

`pqf_jax.kmeans.reference` is the same algorithm without batches and backends.
Here a layer's result is the same, to the bit, whichever layers share its batch
and on however many devices. For this all sums are exact
(`pqf_jax.numerics.segments`).

Bits are also lost where XLA fuses a product with the addition behind it, or
does not: a choice that may depend on the shapes. So the mean, the centred data
and the loop are programs of their own, and inner products
(`pqf_jax.numerics.exact`) and the noise that is added to a centroid are made of
exact products.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from pqf_jax import nvidia
from pqf_jax.kmeans import (
  annealing,
  batching,
  devices,
  empty_clusters,
  hartigan,
)
from pqf_jax.kmeans.backends import (
  base,
  hopper,
  hopper_nearest,
  hopper_sums,
  portable,
  tpu,
)
from pqf_jax.numerics import exact


class Options(NamedTuple):
  """The settings that are compiled into the programs.

  Attributes:
    most_rows: rows of the largest layer on a device, padding included.
    num_hartigan_steps: Hartigan's steps behind those of the schedule.
    num_hartigan_tiles: the number of tiles, the first of each device, whose
      layers' `annealing.Method.assigns_by_hartigan`.
    empty_rule: the rule that places the centroids of empty clusters.
    axis_name: name of the `shard_map` axis over which the tiles are spread, or
      None.
    platform: as `lax.platform_dependent` calls it, if it is known: the steps of
      others, whose tracing takes most of the time, are then left out.
  """

  most_rows: int
  num_hartigan_steps: int = 0
  num_hartigan_tiles: int = 0
  empty_rule: empty_clusters.Rule = empty_clusters.split_worst
  axis_name: str | None = None
  platform: str | None = None


class Prepared(NamedTuple):
  """The data of the loop, computed once.

  Attributes:
    points: the sub-vectors, less `offset`.
    offset: [L, D] float32, the data means.
    squares: [L, D] float32, sums of x^2.
  """

  points: base.Points
  offset: jax.Array
  squares: jax.Array


class Fitted(NamedTuple):
  """The result of `fit` for L layers.

  Attributes:
    codebooks: [L, K, D] float32.
    codes: [B, 1024] int32.
    distortion: [L, T + num_hartigan_steps + 1] float32, squared error of a
      sub-vector.
    variance: [L] float32, of the entries of all sub-vectors.
  """

  codebooks: jax.Array
  codes: jax.Array
  distortion: jax.Array
  variance: jax.Array


def prepare(
  batch: batching.Batch,
  *,
  options: Options,
  mesh: Mesh | None = None,
  apart: bool = False,
) -> Prepared:
  """Returns the data of `fit`, which has the same options and mesh.

  Apart from `fit`, so that the memory of the batch is free while it runs.

  Args:
    batch: the sub-vectors.
    options: the settings that are compiled into the programs.
    mesh: devices over which the tiles of each layer are spread, or None.
    apart: the devices have layers of their own, and all arrays of `prepare` and
      `fit` a leading axis of the devices (see `devices`).
  """
  means, centre, _ = _programs(mesh, options, apart)
  return centre(batch, means(batch))


def fit(
  prepared: Prepared,
  starts: jax.Array,
  schedule: annealing.Schedule,
  normals: jax.Array,
  *,
  options: Options,
  mesh: Mesh | None = None,
  apart: bool = False,
) -> Fitted:
  """Runs the steps of `schedule`, and then Hartigan's.

  Deterministic; all randomness is in `starts` and `normals`.

  Args:
    prepared: the sub-vectors.
    starts: [L, K, D] float32, the first centroids.
    schedule: of T steps.
    normals: [T, L, K, D] bfloat16 draws of a standard normal.
    options: the settings that are compiled into the programs.
    mesh: devices over which the tiles of each layer are spread, or None.
    apart: see `prepare`.

  Returns:
    Codebooks, codes that match them, and the error of every step.
  """
  _, _, run = _programs(mesh, options, apart)
  return run(prepared, starts, schedule, normals)


@functools.partial(jax.jit, static_argnames="options")
def layer_means(batch: batching.Batch, *, options: Options) -> jax.Array:
  """Returns the means of the layers, [L, D]."""
  sums = batching.layer_sums(
    batch.layout,
    batching.split_columns(batch.tiles),
    options.most_rows,
    options.axis_name,
  )
  return sums / batch.layout.sizes[:, None]


@functools.partial(jax.jit, static_argnames="options")
def centre(
  batch: batching.Batch, offset: jax.Array, *, options: Options
) -> Prepared:
  """Centres the sub-vectors, because scores near 0 cancel less."""
  layout, axis_name = batch.layout, options.axis_name
  vectors = batch.tiles - offset[layout.layers][:, None]
  vectors = jnp.where(batching.mask(layout)[:, :, None], vectors, 0)
  columns, norms = batching.split_columns(vectors), exact.dot(vectors, vectors)
  return Prepared(
    points=base.Points(
      columns=columns,
      norms=norms,
      layout=layout,
      scale=batching.layer_scales(layout, columns, axis_name),
      norm_scale=batching.layer_scales(layout, [norms], axis_name),
    ),
    offset=offset,
    squares=batching.layer_sums(
      layout, columns, options.most_rows, axis_name, power=2
    ),
  )


@functools.partial(jax.jit, static_argnames="options")
def run_steps(
  prepared: Prepared,
  starts: jax.Array,
  schedule: annealing.Schedule,
  normals: jax.Array,
  *,
  options: Options,
) -> Fitted:
  """Runs all steps by the backend of the platform; arguments as in `fit`."""
  _, num_codes, length = starts.shape
  backends = backends_for(length, num_codes, options.most_rows)
  if options.platform is not None:
    only = backends.get(options.platform, backends["default"])
    backends = {"default": only}
  runs = {
    platform: functools.partial(_run_steps, backend, options=options)
    for platform, backend in backends.items()
  }
  return lax.platform_dependent(prepared, starts, schedule, normals, **runs)


def backends_for(
  length: int, num_codes: int, most_rows: int
) -> dict[str, base.Backend]:
  """Returns the backend of each platform, from D, K and `Options.most_rows`."""
  backends = {"default": portable.BACKEND}
  if most_rows <= tpu.MOST_ROWS:
    backends["tpu"] = tpu.BACKEND
  if (
    nvidia.is_available()
    and hopper_nearest.fits(length, num_codes)
    and hopper_sums.fits(length + 2, num_codes)
  ):
    with_norms = hopper_nearest.fits(length + 1, num_codes)
    backends["cuda"] = (
      hopper.BACKEND if with_norms else hopper.BACKEND_WITHOUT_HARTIGAN
    )
  return backends


class _Loop(NamedTuple):
  """The constants of all steps.

  Attributes:
    backend: of the platform.
    operands: the points, as the backend prepared them.
    first: assigns the first tiles by Hartigan's rule.
    prepared: see there.
    deviation: of each dimension, [L, D].
    num_codes: K.
    options: see there.
  """

  backend: base.Backend
  operands: Any
  first: _Assign
  prepared: Prepared
  deviation: jax.Array
  num_codes: int
  options: Options

  def totals(self, codes: jax.Array) -> base.Totals:
    """Returns the sums over each cluster, on all devices."""
    integers = self.backend.sums(
      self.operands, codes, self.num_codes, self.options.most_rows
    )
    if self.options.axis_name is not None:
      integers = lax.psum(integers, self.options.axis_name)
    return self.backend.totals(self.operands, integers)


class _State(NamedTuple):
  """The arrays that one step hands to the next.

  Attributes:
    codebooks: [L, K, D].
    velocity: [L, K, D], their last moves.
    codes: [B, 1024], the assignment that `codebooks` was computed from.
    counts: [L, K], the sizes of its clusters; for an empty one, that of the
      cluster beside which its centroid was put.
  """

  codebooks: jax.Array
  velocity: jax.Array
  codes: jax.Array
  counts: jax.Array


_Assign = Callable[[_State, jax.Array, float], jax.Array]
"""(state, codes, weight) -> the codes of some tiles by Hartigan's rule."""


def _run_steps(
  backend: base.Backend,
  prepared: Prepared,
  starts: jax.Array,
  schedule: annealing.Schedule,
  normals: jax.Array,
  *,
  options: Options,
) -> Fitted:
  points = prepared.points
  operands = backend.prepare(points)
  sizes = points.layout.sizes[:, None]
  deviation = jnp.sqrt(prepared.squares / jnp.maximum(sizes - 1, 1))
  num_codes = starts.shape[1]
  first = _by_hartigan(backend, points.first(options.num_hartigan_tiles))
  loop = _Loop(
    backend, operands, first, prepared, deviation, num_codes, options
  )
  start = starts - prepared.offset[:, None]
  codes = jnp.zeros(points.norms.shape, jnp.int32)
  if options.num_hartigan_tiles:
    codes = backend.codes(operands, start)
  counts = jnp.broadcast_to(sizes / num_codes, start.shape[:2])
  state, trace = lax.scan(
    functools.partial(_step, loop),
    _State(start, jnp.zeros_like(start), codes, counts),
    (*schedule, normals),
    unroll=backend.unroll,
  )
  turns = jnp.arange(options.num_hartigan_steps, dtype=jnp.int32)
  everyone = _by_hartigan(backend, points)
  step = functools.partial(_hartigan_step, loop, everyone)
  state, more = lax.scan(step, state, turns)
  codes = backend.codes(operands, state.codebooks)
  return _fitted(loop, state.codebooks, codes, jnp.concatenate([trace, more]))


def _by_hartigan(backend: base.Backend, points: base.Points) -> _Assign:
  vectors = backend.split(points)
  columns, layers = points.columns, points.layout.layers
  return lambda state, codes, weight: hartigan.assign(
    columns,
    state.codebooks,
    state.counts,
    layers,
    codes,
    weight=weight,
    vectors=vectors,
  )


def _step(
  loop: _Loop, state: _State, inputs: tuple[jax.Array, jax.Array, jax.Array]
) -> tuple[_State, jax.Array]:
  """Takes one step of SR-C; also returns the gains before it."""
  amounts, momenta, normal = inputs
  codes = _assigned(loop, state)
  totals = loop.totals(codes)
  clusters, gains = _clusters(loop.backend, state.codebooks, totals)
  proposal = jax.vmap(loop.options.empty_rule)(clusters)
  ahead, velocity = _with_momentum(state, clusters, proposal, momenta)
  noise = (amounts[:, None] * loop.deviation)[:, None]
  noise = noise / jnp.sqrt(proposal.counts)[:, :, None]
  # 16 bits times the 8 of a bfloat16: an exact product.
  noise = lax.reduce_precision(jnp.maximum(noise, proposal.spread), 8, 15)
  moved = ahead + noise * normal.astype(jnp.float32)
  return _State(moved, velocity, codes, proposal.counts), gains


def _assigned(loop: _Loop, state: _State) -> jax.Array:
  """Returns the codes of a step, [B, 1024]."""
  num_tiles = loop.options.num_hartigan_tiles
  if num_tiles == 0:
    return loop.backend.codes(loop.operands, state.codebooks)
  codes = state.codes[:num_tiles]
  moved = loop.first(state, codes, annealing.HARTIGAN_WEIGHT)
  if num_tiles == len(state.codes):
    return moved
  # The nearest centroids of these tiles are not needed, but cost little. They
  # are overwritten in place, which without the barrier XLA:GPU (jax 0.11.2)
  # refuses to compile, because a kernel wrote them.
  nearest = loop.backend.codes(loop.operands, state.codebooks)
  return lax.optimization_barrier(nearest).at[:num_tiles].set(moved)


def _clusters(
  backend: base.Backend, codebooks: jax.Array, totals: base.Totals
) -> tuple[empty_clusters.Clusters, jax.Array]:
  """Returns the clusters, and their gains [L, K].

  The gain of a cluster is the sum of |x - c|^2 less that of |x|^2.
  """
  counts = totals.counts
  gains = counts * backend.dot(codebooks, codebooks)
  gains = gains - 2 * backend.dot(codebooks, totals.vectors)
  errors = jnp.maximum(totals.norms + gains, 0)
  clusters = empty_clusters.Clusters(
    codebook=codebooks,
    means=totals.vectors / jnp.maximum(counts, 1)[:, :, None],
    counts=counts,
    errors=lax.reduce_precision(errors, 8, 9),
  )
  return clusters, gains


def _with_momentum(
  state: _State,
  clusters: empty_clusters.Clusters,
  proposal: empty_clusters.Proposal,
  momenta: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Returns the proposed centroids, carried further, and their moves.

  Both are [L, K, D]. The centroids of empty clusters rest where they were put.
  """
  way = proposal.centroids - state.codebooks
  # 22 bits times the 2 of a momentum: an exact product.
  further = lax.reduce_precision(way + state.velocity, 8, 21)
  ahead = proposal.centroids + momenta[:, None, None] * further
  empty = clusters.counts[:, :, None] == 0
  ahead = jnp.where(empty, proposal.centroids, ahead)
  return ahead, jnp.where(empty, 0, ahead - state.codebooks)


def _hartigan_step(
  loop: _Loop, everyone: _Assign, state: _State, turn: jax.Array
) -> tuple[_State, jax.Array]:
  """Takes one of Hartigan's steps; also returns the gains after it."""
  moved = everyone(state, state.codes, 1.0)
  # Half of them at a time: each is judged as if it moved alone.
  place = jnp.arange(moved.shape[1], dtype=jnp.int32)
  codes = jnp.where((place % 2 == turn % 2)[None], moved, state.codes)
  totals = loop.totals(codes)
  clusters, _ = _clusters(loop.backend, state.codebooks, totals)
  some = totals.counts[:, :, None] > 0
  means = jnp.where(some, clusters.means, state.codebooks)
  _, gains = _clusters(loop.backend, means, totals)
  return _State(means, state.velocity, codes, totals.counts), gains


def _fitted(
  loop: _Loop, codebooks: jax.Array, codes: jax.Array, gains: jax.Array
) -> Fitted:
  """Returns the result, from the gains of all steps, [T, L, K]."""
  points, squares = loop.prepared.points, loop.prepared.squares
  sizes = points.layout.sizes[:, None]
  residual = jnp.stack(points.columns, 2)
  residual = residual - codebooks[points.layout.layers[:, None], codes]
  inside = batching.mask(points.layout)[:, :, None]
  error = jnp.square(jnp.where(inside, residual, 0))
  error = batching.layer_sums(
    points.layout,
    [error.sum(axis=2)],
    loop.options.most_rows,
    loop.options.axis_name,
  )
  # Rounding may take the error of a perfect fit below 0.
  trace = squares.sum(axis=1)[None] + gains.sum(axis=2)
  errors = jnp.concatenate([jnp.maximum(trace.T, 0), error], axis=1)
  spread = loop.prepared.offset.var(axis=1)
  return Fitted(
    codebooks=codebooks + loop.prepared.offset[:, None],
    codes=codes,
    distortion=errors / sizes,
    variance=(squares / sizes).mean(axis=1) + spread,
  )


# Trees of these types with a PartitionSpec for each array.
_SPREAD = PartitionSpec("tiles")
_SAME = PartitionSpec()
_LAYOUT = batching.Layout._make((_SPREAD, _SPREAD, _SAME))
_BATCH = batching.Batch._make((_SPREAD, _LAYOUT))
_POINTS = base.Points._make((_SPREAD, _SPREAD, _LAYOUT, _SAME, _SAME))
_PREPARED = Prepared._make((_POINTS, _SAME, _SAME))
_FITTED = Fitted._make((_SAME, _SPREAD, _SAME, _SAME))

_PROGRAMS: tuple[tuple[Callable[..., Any], Any, Any], ...] = (
  (layer_means, (_BATCH,), _SAME),
  (centre, (_BATCH, _SAME), _PREPARED),
  (run_steps, (_PREPARED, _SAME, (_SAME, _SAME), _SAME), _FITTED),
)
"""(program, specs of its arguments, specs of its results)."""


@functools.cache
def _programs(
  mesh: Mesh | None, options: Options, apart: bool
) -> tuple[Callable[..., Any], ...]:
  """Returns the three programs, for all devices of `mesh` if any."""
  if mesh is None:
    return tuple(
      functools.partial(
        devices.on_one, options.platform, function, options=options
      )
      for function, *_ in _PROGRAMS
    )
  if apart:
    return tuple(
      functools.partial(devices.on_each, mesh, function, options=options)
      for function, *_ in _PROGRAMS
    )
  options = options._replace(axis_name="tiles")
  tiles = Mesh(mesh.devices.reshape(-1), ("tiles",))
  return tuple(
    jax.jit(
      jax.shard_map(
        functools.partial(function, options=options),
        mesh=tiles,
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=False,
      )
    )
    for function, in_specs, out_specs in _PROGRAMS
  )

"""The steps of SR-C k-means, in the form of the platform.

See `pqf_jax.kmeans.kmeans` for what they are, and `pqf_jax.kmeans.loop` for how
they give the same bits in every program.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pqf_jax.kmeans import annealing, batching, empty_clusters
from pqf_jax.kmeans.backends import base

Rule = Callable[[empty_clusters.Clusters], empty_clusters.Proposal]


class Prepared(NamedTuple):
  """What the loop needs, computed once.

  Attributes:
    points: the sub-vectors, less `offset`.
    offset: [L, D] float32, the data means.
    squares: [L, D] float32, sums of x^2.
  """

  points: base.Points
  offset: jax.Array
  squares: jax.Array


class Options(NamedTuple):
  """What is known when the programs are compiled.

  Attributes:
    most_rows: rows of the layer that has most, padding included, on a device.
    num_transfers: steps of `transfers` behind those of the schedule.
    num_own_blocks: the first blocks of each device, whose layers'
      `annealing.Method.weighs_own`.
    reseed: the rule that places the centroids of empty clusters.
    axis_name: of the devices over which the blocks are spread, or None.
  """

  most_rows: int
  num_transfers: int = 0
  num_own_blocks: int = 0
  reseed: Rule = empty_clusters.split_worst
  axis_name: str | None = None


class Fitted(NamedTuple):
  """The result of `fit` for L layers.

  Attributes:
    codebooks: [L, K, D] float32.
    codes: [B, 1024] int32.
    distortion: [L, T + num_transfers + 1] float32, squared error of a
      sub-vector.
    variance: [L] float32, of the entries of all sub-vectors.
  """

  codebooks: jax.Array
  codes: jax.Array
  distortion: jax.Array
  variance: jax.Array


class _Loop(NamedTuple):
  """What no step changes.

  Attributes:
    form: of the platform.
    operands: of the form.
    own: the form's candidates of the blocks that weigh their own.
    prepared: see there.
    deviation: of each dimension, [L, D].
    num_codes: K.
    options: see there.
  """

  form: base.Form
  operands: Any
  own: base.Candidates
  prepared: Prepared
  deviation: jax.Array
  num_codes: int
  options: Options

  def totals(self, codes: jax.Array) -> base.Totals:
    """Sums over each cluster, on all devices."""
    integers = self.form.sums(
      self.operands, codes, self.num_codes, self.options.most_rows
    )
    if self.options.axis_name is not None:
      integers = lax.psum(integers, self.options.axis_name)
    return self.form.totals(self.operands, integers)


class _State(NamedTuple):
  """What a step leaves to the next.

  Attributes:
    codebooks: [L, K, D].
    velocity: [L, K, D], their last moves.
    codes: [B, 1024], of the clusters of whose means they are made.
    counts: [L, K], the sizes of these clusters; of an empty one, that of the
      cluster beside which its centroid was put.
  """

  codebooks: jax.Array
  velocity: jax.Array
  codes: jax.Array
  counts: jax.Array


def iterate(
  form: base.Form,
  prepared: Prepared,
  starts: jax.Array,
  schedule: annealing.Schedule,
  normals: jax.Array,
  *,
  options: Options,
) -> Fitted:
  """All steps of `schedule`, and then transfers; arguments as in `fit`."""
  operands = form.prepare(prepared.points)
  sizes = prepared.points.places.sizes[:, None]
  deviation = jnp.sqrt(prepared.squares / jnp.maximum(sizes - 1, 1))
  num_codes = starts.shape[1]
  own = form.candidates(prepared.points.first(options.num_own_blocks))
  loop = _Loop(form, operands, own, prepared, deviation, num_codes, options)
  start = starts - prepared.offset[:, None]
  codes = jnp.zeros(prepared.points.norms.shape, jnp.int32)
  if options.num_own_blocks:
    codes = form.codes(operands, start)
  counts = jnp.broadcast_to(sizes / num_codes, start.shape[:2])
  state, trace = lax.scan(
    functools.partial(_step, loop),
    _State(start, jnp.zeros_like(start), codes, counts),
    (*schedule, normals),
    unroll=form.unroll,
  )
  turns = jnp.arange(options.num_transfers, dtype=jnp.int32)
  everyone = form.candidates(prepared.points)
  step = functools.partial(_transfer, loop, everyone)
  state, more = lax.scan(step, state, turns)
  codes = form.codes(operands, state.codebooks)
  return _fitted(loop, state.codebooks, codes, jnp.concatenate([trace, more]))


def _step(
  loop: _Loop,
  state: _State,
  inputs: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[_State, jax.Array]:
  """One step of SR-C, and the error before it, as of `_clusters`."""
  amounts, momenta, normal = inputs
  codes = _assigned(loop, state)
  totals = loop.totals(codes)
  found, gains = _clusters(loop.form, state.codebooks, totals)
  proposal = jax.vmap(loop.options.reseed)(found)
  ahead, velocity = _carried_on(state, found, proposal, momenta)
  noise = (amounts[:, None] * loop.deviation)[:, None]
  noise = noise / jnp.sqrt(proposal.counts)[:, :, None]
  # 16 bits times the 8 of a bfloat16: an exact product.
  noise = lax.reduce_precision(jnp.maximum(noise, proposal.spread), 8, 15)
  moved = ahead + noise * normal.astype(jnp.float32)
  return _State(moved, velocity, codes, proposal.counts), gains


def _assigned(loop: _Loop, state: _State) -> jax.Array:
  """The codes of a step, [B, 1024]."""
  num_own = loop.options.num_own_blocks
  if num_own == 0:
    return loop.form.codes(loop.operands, state.codebooks)
  own = loop.own.transferred(
    state.codebooks,
    state.counts,
    state.codes[:num_own],
    annealing.OWN_WEIGHT,
  )
  if num_own == len(state.codes):
    return own
  # Their nearest centroids are not needed, but little to find. They are written
  # over in place, which without the barrier XLA:GPU (jax 0.11.2) refuses to
  # compile, because what it writes into comes from a kernel.
  nearest = loop.form.codes(loop.operands, state.codebooks)
  return lax.optimization_barrier(nearest).at[:num_own].set(own)


def _carried_on(
  state: _State,
  found: empty_clusters.Clusters,
  proposal: empty_clusters.Proposal,
  momenta: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """The proposed centroids, carried further, and their moves, [L, K, D].

  New centroids rest where they were put.
  """
  way = proposal.centroids - state.codebooks
  # 22 bits times the 2 of a momentum: an exact product.
  further = lax.reduce_precision(way + state.velocity, 8, 21)
  ahead = proposal.centroids + momenta[:, None, None] * further
  new = found.counts[:, :, None] == 0
  ahead = jnp.where(new, proposal.centroids, ahead)
  return ahead, jnp.where(new, 0, ahead - state.codebooks)


def _transfer(
  loop: _Loop, everyone: base.Candidates, state: _State, turn: jax.Array
) -> tuple[_State, jax.Array]:
  """One step of transfers, and the error after it, as of `_clusters`."""
  moved = everyone.transferred(state.codebooks, state.counts, state.codes, 1.0)
  # Half of them at a time: each is judged as if it moved alone.
  place = jnp.arange(moved.shape[1], dtype=jnp.int32)
  codes = jnp.where((place % 2 == turn % 2)[None], moved, state.codes)
  totals = loop.totals(codes)
  found, _ = _clusters(loop.form, state.codebooks, totals)
  some = totals.counts[:, :, None] > 0
  means = jnp.where(some, found.means, state.codebooks)
  _, gains = _clusters(loop.form, means, totals)
  return _State(means, state.velocity, codes, totals.counts), gains


def _fitted(
  loop: _Loop, codebooks: jax.Array, codes: jax.Array, trace: jax.Array
) -> Fitted:
  """The result; trace: [T, L, K] errors less the sums of |x|^2."""
  points, squares = loop.prepared.points, loop.prepared.squares
  sizes = points.places.sizes[:, None]
  residual = jnp.stack(points.columns, 2)
  residual = residual - codebooks[points.places.layers[:, None], codes]
  inside = batching.inside(points.places)[:, :, None]
  error = jnp.square(jnp.where(inside, residual, 0))
  error = batching.totals(
    points.places,
    error.sum(axis=2, keepdims=True),
    most_rows=loop.options.most_rows,
    axis_name=loop.options.axis_name,
  )
  # Rounding may take the error of a perfect fit below 0.
  trace = squares.sum(axis=1)[None] + trace.sum(axis=2)
  trace = [jnp.maximum(trace.T, 0), error]
  spread = loop.prepared.offset.var(axis=1)
  return Fitted(
    codebooks=codebooks + loop.prepared.offset[:, None],
    codes=codes,
    distortion=jnp.concatenate(trace, axis=1) / sizes,
    variance=(squares / sizes).mean(axis=1) + spread,
  )


def _clusters(
  form: base.Form, codebooks: jax.Array, totals: base.Totals
) -> tuple[empty_clusters.Clusters, jax.Array]:
  """The clusters, and by cluster the sum of |x - c|^2 less that of |x|^2."""
  counts = totals.counts
  gains = counts * form.dot(codebooks, codebooks)
  gains = gains - 2 * form.dot(codebooks, totals.vectors)
  errors = jnp.maximum(totals.norms + gains, 0)
  found = empty_clusters.Clusters(
    codebook=codebooks,
    means=totals.vectors / jnp.maximum(counts, 1)[:, :, None],
    counts=counts,
    errors=lax.reduce_precision(errors, 8, 9),
  )
  return found, gains

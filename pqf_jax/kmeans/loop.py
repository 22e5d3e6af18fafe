"""The loop of SR-C k-means over the sub-vectors of one or several layers.

Layers share one program: their sub-vectors are cut into blocks of 1024, a block
belongs to one layer, and what pads a layer's last block has weight 0. All sums
are exact (`pqf_jax.numerics.segments`), so that a layer's result is the same,
to the bit, whichever layers it is computed with and on however many devices.

Bits are also lost where XLA fuses a product with the addition behind it, or
does not: a choice that may depend on the shapes. So the mean, the centred data
and the loop are programs of their own, and inner products
(`pqf_jax.numerics.exact`) and the noise that is added to a centroid are made of
exact products.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from pqf_jax.kmeans import annealing, assignment, batching, iteration
from pqf_jax.kmeans.backends import base, selection
from pqf_jax.numerics import exact


def fit(
  packed: batching.Packed,
  starts: jax.Array,
  schedule: annealing.Schedule,
  normals: jax.Array,
  *,
  options: iteration.Options,
  mesh: Mesh | None = None,
) -> iteration.Fitted:
  """Runs the steps of `schedule`, and then transfers.

  Deterministic; all randomness is in `starts` and `normals`.

  Args:
    packed: the sub-vectors.
    starts: [L, K, D] float32, the first centroids.
    schedule: of T steps.
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
def _offsets(
  packed: batching.Packed, *, options: iteration.Options
) -> jax.Array:
  """The means of the layers, [L, D]."""
  totals = batching.totals(
    packed.places,
    packed.blocks,
    most_rows=options.most_rows,
    axis_name=options.axis_name,
  )
  return totals / packed.places.sizes[:, None]


@functools.partial(jax.jit, static_argnames="options")
def _prepared(
  packed: batching.Packed, offset: jax.Array, *, options: iteration.Options
) -> iteration.Prepared:
  # The data mean is moved to 0: the scores of `nearest` cancel less there.
  vectors = packed.blocks - offset[packed.places.layers][:, None]
  vectors = jnp.where(batching.inside(packed.places)[:, :, None], vectors, 0)
  norms = exact.dot(vectors, vectors)[:, :, None]
  scales = functools.partial(
    batching.scales, packed.places, axis_name=options.axis_name
  )
  squares = batching.totals(
    packed.places,
    jnp.square(vectors),
    most_rows=options.most_rows,
    axis_name=options.axis_name,
  )
  return iteration.Prepared(
    points=base.Points(
      columns=assignment.split_columns(vectors),
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
  prepared: iteration.Prepared,
  starts: jax.Array,
  schedule: annealing.Schedule,
  normals: jax.Array,
  *,
  options: iteration.Options,
) -> iteration.Fitted:
  _, num_codes, length = starts.shape
  run = functools.partial(iteration.iterate, options=options)
  return selection.by_platform(
    run,
    prepared,
    starts,
    schedule,
    normals,
    length=length,
    num_codes=num_codes,
    most_rows=options.most_rows,
  )


_SPREAD = PartitionSpec("blocks")
_SAME = PartitionSpec()
_PLACES = batching.Places(_SPREAD, _SPREAD, _SAME)
_PACKED = batching.Packed(_SPREAD, _PLACES)
_POINTS = base.Points(_SPREAD, _SPREAD, _PLACES, _SAME, _SAME)
_PREPARED = iteration.Prepared(_POINTS, _SAME, _SAME)
_SPECS = {
  _offsets: ((_PACKED,), _SAME),
  _prepared: ((_PACKED, _SAME), _PREPARED),
  _loop: (
    (_PREPARED, _SAME, annealing.Schedule(_SAME, _SAME), _SAME),
    iteration.Fitted(_SAME, _SPREAD, _SAME, _SAME),
  ),
}
"""(arguments, results) of each program on several devices."""


@functools.cache
def _on_devices(
  mesh: Mesh, options: iteration.Options
) -> tuple[Callable[..., Any], ...]:
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

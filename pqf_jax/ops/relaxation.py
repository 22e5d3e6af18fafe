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
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from pqf_jax.ops import nearest, reseeding, segments

Rule = Callable[[reseeding.Clusters], reseeding.Proposal]


class Packed(NamedTuple):
  """The sub-vectors of L layers, in blocks.

  Attributes:
    blocks: [B, 1024, D] float32, zeros behind a layer's last sub-vector.
    layers: [B] int32, the layer of each block; a layer's blocks are adjacent.
    filled: [B] int32, the sub-vectors of each block.
    sizes: [L] float32, N of each layer.
  """

  blocks: jax.Array
  layers: jax.Array
  filled: jax.Array
  sizes: jax.Array


class Prepared(NamedTuple):
  """What the loop needs, computed once.

  Attributes:
    columns: D arrays [B, 1024] float32, the sub-vectors less `offset`.
    words: [B * 1024, 2 D + 2] int32, what a step adds up: each x in two words,
      |x|^2 in one, and 1; zeros where there is no sub-vector.
    scale: [L, D] float32, unit of x.
    norm_scale: [L, 1] float32, unit of |x|^2.
    offset: [L, D] float32, the data means.
    squares: [L, D] float32, sums of x^2.
  """

  columns: tuple[jax.Array, ...]
  words: jax.Array
  scale: jax.Array
  norm_scale: jax.Array
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


def pack(layers: Sequence[jax.Array], *, num_shards: int = 1) -> Packed:
  """Packs sub-vectors [N_l, D] of each layer.

  Args:
    layers: one array a layer, of the same D.
    num_shards: the number of blocks of one layer becomes a multiple of it.

  Returns:
    The blocks; all but their content is known without running anything.
  """
  rows = nearest.BLOCK * num_shards
  blocks, owners, filled = [], [], []
  for index, vectors in enumerate(layers):
    count = vectors.shape[0]
    padded = jnp.pad(vectors, ((0, -count % rows), (0, 0)))
    blocks.append(padded.reshape(-1, nearest.BLOCK, vectors.shape[1]))
    starts = np.arange(blocks[-1].shape[0]) * nearest.BLOCK
    owners.append(np.full(starts.size, index, np.int32))
    filled.append(np.clip(count - starts, 0, nearest.BLOCK).astype(np.int32))
  return Packed(
    blocks=jnp.concatenate(blocks).astype(jnp.float32),
    layers=jnp.asarray(np.concatenate(owners)),
    filled=jnp.asarray(np.concatenate(filled)),
    sizes=jnp.asarray([vectors.shape[0] for vectors in layers], jnp.float32),
  )


def fit(
  packed: Packed,
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
  return loop(packed, prepared, starts, schedule, normals)


@functools.partial(jax.jit, static_argnames="options")
def _offsets(packed: Packed, *, options: Options) -> jax.Array:
  """The means of the layers, [L, D]."""
  return _totals(packed, packed.blocks, options) / packed.sizes[:, None]


@functools.partial(jax.jit, static_argnames="options")
def _prepared(
  packed: Packed, offset: jax.Array, *, options: Options
) -> Prepared:
  # The data mean is moved to 0: the scores of `nearest` cancel less there.
  vectors = packed.blocks - offset[packed.layers][:, None]
  inside = _inside(packed)[:, :, None]
  vectors = jnp.where(inside, vectors, 0)
  norms = jnp.square(vectors).sum(axis=2, keepdims=True)
  scale = _scales(packed, vectors, options)
  norm_scale = _scales(packed, norms, options)
  fractions = vectors / scale[packed.layers][:, None]
  norm_fractions = norms / norm_scale[packed.layers][:, None]
  words = jnp.concatenate(
    [
      segments.to_words(fractions),
      segments.to_word(norm_fractions).astype(jnp.int32),
      inside.astype(jnp.int32),
    ],
    axis=2,
  )
  return Prepared(
    columns=nearest.split_columns(vectors),
    words=words.reshape(-1, words.shape[2]),
    scale=scale,
    norm_scale=norm_scale * segments.LOW_UNIT,
    offset=offset,
    squares=_totals(packed, jnp.square(vectors), options),
  )


@functools.partial(jax.jit, static_argnames="options")
def _loop(
  packed: Packed,
  prepared: Prepared,
  starts: jax.Array,
  schedule: jax.Array,
  normals: jax.Array,
  *,
  options: Options,
) -> Fitted:
  num_layers, num_codes, _ = starts.shape
  columns, layers = prepared.columns, packed.layers
  sizes, squares = packed.sizes[:, None], prepared.squares
  deviation = jnp.sqrt(squares / jnp.maximum(sizes - 1, 1))

  def step(
    codebooks: jax.Array, inputs: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, jax.Array]:
    amount, normal = inputs
    codes = nearest.nearest_centroid(columns, codebooks, layers)
    owner = codes + layers[:, None] * num_codes
    sums = segments.word_sums(
      prepared.words,
      owner.reshape(-1),
      num_layers * num_codes,
      most_added=options.most_rows,
      axis_name=options.axis_name,
    )
    sums = sums.reshape(num_layers, num_codes, -1)
    clusters, gains = _clusters(prepared, codebooks, sums)
    proposal = jax.vmap(options.reseed)(clusters)
    noise = amount * deviation[:, None]
    noise = noise / jnp.sqrt(proposal.counts)[:, :, None]
    # 16 bits times the 8 of a bfloat16: an exact product.
    noise = lax.reduce_precision(jnp.maximum(noise, proposal.spread), 8, 15)
    moved = proposal.centroids + noise * normal.astype(jnp.float32)
    return moved, squares.sum(axis=1) + gains

  start = starts - prepared.offset[:, None]
  codebooks, trace = lax.scan(step, start, (schedule, normals))
  codes = nearest.nearest_centroid(columns, codebooks, layers)
  residual = jnp.stack(columns, 2) - codebooks[layers[:, None], codes]
  residual = jnp.where(_inside(packed)[:, :, None], residual, 0)
  error = jnp.square(residual).sum(axis=2, keepdims=True)
  # Rounding may take the error of a perfect fit below 0.
  trace = [jnp.maximum(trace.T, 0), _totals(packed, error, options)]
  spread = prepared.offset.var(axis=1)
  return Fitted(
    codebooks=codebooks + prepared.offset[:, None],
    codes=codes,
    distortion=jnp.concatenate(trace, axis=1) / sizes,
    variance=(squares / sizes).mean(axis=1) + spread,
  )


def _clusters(
  prepared: Prepared, codebooks: jax.Array, sums: jax.Array
) -> tuple[reseeding.Clusters, jax.Array]:
  """From the sums of `Prepared.words`, [L, K, 2 D + 2].

  Returns:
    The clusters, and by layer the sum of |x - c|^2 less that of |x|^2, [L].
  """
  vector_sums = segments.from_words(sums[:, :, :-2])
  vector_sums = vector_sums * prepared.scale[:, None]
  counts = sums[:, :, -1]
  gains = counts * jnp.square(codebooks).sum(axis=2)
  gains = gains - 2 * (codebooks * vector_sums).sum(axis=2)
  errors = jnp.maximum(sums[:, :, -2] * prepared.norm_scale + gains, 0)
  clusters = reseeding.Clusters(
    codebook=codebooks,
    means=vector_sums / jnp.maximum(counts, 1)[:, :, None],
    counts=counts,
    errors=lax.reduce_precision(errors, 8, 9),
  )
  return clusters, gains.sum(axis=1)


def _inside(packed: Packed) -> jax.Array:
  """[B, 1024] bool: which entries are sub-vectors, not padding."""
  place = jnp.arange(nearest.BLOCK, dtype=jnp.int32)
  return place[None] < packed.filled[:, None]


def _totals(packed: Packed, values: jax.Array, options: Options) -> jax.Array:
  """[B, 1024, C] -> the sums of every layer, [L, C]."""
  scale = _scales(packed, values, options)
  words = segments.to_words(values / scale[packed.layers][:, None])
  sums = segments.word_sums(
    words.reshape(-1, words.shape[2]),
    jnp.repeat(packed.layers, nearest.BLOCK),
    scale.shape[0],
    most_added=options.most_rows,
    axis_name=options.axis_name,
  )
  return segments.from_words(sums) * scale


def _scales(packed: Packed, values: jax.Array, options: Options) -> jax.Array:
  """The power of two above each layer's largest entries, [L, C]."""
  largest = jax.ops.segment_max(
    jnp.abs(values).max(axis=1), packed.layers, packed.sizes.size
  )
  if options.axis_name is not None:
    largest = lax.pmax(largest, options.axis_name)
  return segments.power_of_two(largest)


_SPREAD = PartitionSpec("blocks")
_SAME = PartitionSpec()
_PACKED = Packed(_SPREAD, _SPREAD, _SPREAD, _SAME)
_PREPARED = Prepared(_SPREAD, _SPREAD, _SAME, _SAME, _SAME, _SAME)
_SPECS = {
  _offsets: ((_PACKED,), _SAME),
  _prepared: ((_PACKED, _SAME), _PREPARED),
  _loop: (
    (_PACKED, _PREPARED, _SAME, _SAME, _SAME),
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

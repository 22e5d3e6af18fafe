"""Batches: the sub-vectors of one or several layers in one set of tiles.

Sub-vectors are cut into tiles of 1024. A tile belongs to one layer; a layer's
last tile is padded, and padding counts for nothing. Tiles let layers of any
size share one program, because a tile may have a codebook of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from pqf_jax.numerics import segments

TILE = 1024
"""Sub-vectors of a tile."""


class Layout(NamedTuple):
  """The layer of each tile, and how many sub-vectors it holds.

  Attributes:
    layers: [B] int32, the layer of each tile. Each device has its share of
      every layer, one layer after the other.
    filled: [B] int32, the number of sub-vectors of each tile.
    sizes: [L] float32, N of each layer.
  """

  layers: jax.Array
  filled: jax.Array
  sizes: jax.Array


class Batch(NamedTuple):
  """The sub-vectors of L layers, in tiles.

  Attributes:
    tiles: [B, 1024, D] float32, zeros behind a layer's last sub-vector.
    layout: the layer of each tile, and how full it is.
  """

  tiles: jax.Array
  layout: Layout


def _devices(vectors: jax.Array) -> set[jax.Device]:
  """Returns the devices that hold `vectors`; none while jax traces."""
  if isinstance(vectors, jax.core.Tracer) or not isinstance(vectors, jax.Array):
    return set()
  return vectors.sharding.device_set


def on_one_device(vectors: jax.Array) -> jax.Array:
  """Returns one copy, if every device of several has all of `vectors`."""
  if len(_devices(vectors)) > 1 and vectors.is_fully_replicated:
    return vectors.addressable_data(0)
  return vectors


def mesh_of(layers: Sequence[jax.Array]) -> Mesh | None:
  """Returns the devices over which the layers are spread, if several.

  The compiler cannot divide a kernel among devices.
  """
  devices = set().union(*map(_devices, layers))
  if len(devices) < 2:
    return None
  return Mesh(sorted(devices, key=lambda device: device.id), ("devices",))


def make_batch(layers: Sequence[jax.Array], *, num_shards: int = 1) -> Batch:
  """Puts the sub-vectors [N_l, D] of each layer into tiles.

  Args:
    layers: one array for each layer, of the same D.
    num_shards: devices over which the tiles will be spread; the number of tiles
      of one layer becomes a multiple of it.

  Returns:
    The batch. Its layout depends on the shapes only.
  """
  counts = [vectors.shape[0] for vectors in layers]
  bounds = tile_bounds(counts, num_shards)
  tiles, owners, filled = [], [], []
  for index, vectors in enumerate(layers):
    shape = num_shards, bounds[index + 1] - bounds[index]
    padding = math.prod(shape) * TILE - counts[index]
    padded = jnp.pad(vectors, ((0, padding), (0, 0)))
    tiles.append(padded.reshape(*shape, TILE, vectors.shape[1]))
    starts = np.arange(math.prod(shape)).reshape(shape) * TILE
    owners.append(np.full(shape, index, np.int32))
    filled.append(np.clip(counts[index] - starts, 0, TILE))
  joined = jnp.concatenate(tiles, axis=1).astype(jnp.float32)
  layout = Layout(
    layers=jnp.asarray(np.concatenate(owners, axis=1).reshape(-1)),
    filled=jnp.asarray(np.concatenate(filled, axis=1).reshape(-1), jnp.int32),
    sizes=jnp.asarray(counts, jnp.float32),
  )
  return Batch(joined.reshape(-1, *joined.shape[2:]), layout)


def tile_bounds(counts: Sequence[int], num_shards: int = 1) -> list[int]:
  """Returns the first tile of each layer on a device, then their number: [L+1].

  Here and below, `counts` are the N of the layers.
  """
  unit = TILE * num_shards
  return np.cumsum([0, *(-(-count // unit) for count in counts)]).tolist()


def rows_in_batch(
  rows: jax.Array, counts: Sequence[int], *, num_shards: int = 1
) -> jax.Array:
  """Finds rows of each layer among the [B * 1024] of a batch, [L, K] both."""
  bounds = np.array(tile_bounds(counts, num_shards), np.int32) * TILE
  on_each = np.diff(bounds)[:, None]
  return rows // on_each * bounds[-1] + bounds[:-1, None] + rows % on_each


def split_batch(
  values: jax.Array, counts: Sequence[int], *, num_shards: int = 1
) -> list[jax.Array]:
  """Returns the [N_l] values of each layer from the [B, 1024] of a batch."""
  shares = values.reshape(num_shards, -1, values.shape[1])
  bounds = tile_bounds(counts, num_shards)
  return [
    shares[:, first:end].reshape(-1)[:count]
    for count, (first, end) in zip(
      counts, itertools.pairwise(bounds), strict=True
    )
  ]


def split_columns(tiles: jax.Array) -> tuple[jax.Array, ...]:
  """Returns the D columns, each [B, 1024], of tiles [B, 1024, D].

  Everything below works on columns, because the long axis is the one that
  vector lanes, threads and cores should run along.
  """
  return tuple(tiles[:, :, i] for i in range(tiles.shape[2]))


def mask(layout: Layout) -> jax.Array:
  """Returns [B, 1024] bool: which entries are sub-vectors, not padding."""
  place = jnp.arange(TILE, dtype=jnp.int32)
  return place[None] < layout.filled[:, None]


def layer_sums(
  layout: Layout, values: jax.Array, most_rows: int, axis_name: str | None
) -> jax.Array:
  """Sums values [B, 1024, C] over each layer, exactly: [L, C].

  Args:
    layout: says which layer a tile belongs to.
    values: float32, 0 where there is no sub-vector.
    most_rows: rows of the largest layer on one device, padding included.
    axis_name: name of the `shard_map` axis over which the tiles are spread, or
      None.
  """
  scale = layer_scales(layout, values, axis_name)
  words = segments.to_words(values / scale[layout.layers][:, None])
  sums = segments.integer_sums(
    words.reshape(-1, words.shape[2]),
    jnp.repeat(layout.layers, TILE),
    scale.shape[0],
    most_added=most_rows,
  )
  if axis_name is not None:
    sums = lax.psum(sums, axis_name)
  return segments.from_words(segments.merge(*sums)) * scale


def layer_scales(
  layout: Layout, values: jax.Array, axis_name: str | None
) -> jax.Array:
  """Returns the power of two above each layer's largest entries, [L, C]."""
  largest = jax.ops.segment_max(
    jnp.abs(values).max(axis=1), layout.layers, layout.sizes.size
  )
  if axis_name is not None:
    largest = lax.pmax(largest, axis_name)
  return segments.power_of_two(largest)

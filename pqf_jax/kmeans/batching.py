"""Batches: the sub-vectors of one or several layers in one set of tiles.

Sub-vectors are cut into tiles of 1024. A tile belongs to one layer; a layer's
last tile is padded, and padding counts for nothing. Tiles let layers of any
size share one program, because a tile may have a codebook of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from pqf_jax import nvidia
from pqf_jax.numerics import segments

TILE = 1024
"""Sub-vectors of a tile."""

# A part, whose words are stored at a time, has at least so many tiles; there
# are at most so many parts, because each costs a GPU several launches.
_LEAST_TILES = 64
_MOST_PARTS = 16


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


def _devices(vectors: jax.Array | np.ndarray) -> set[jax.Device]:
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


def platform_of(layers: Sequence[jax.Array | np.ndarray]) -> str | None:
  """Returns the platform of the devices that hold the layers, if it is known.

  It is called as `lax.platform_dependent` calls it.
  """
  devices = set().union(*map(_devices, layers))
  (platform,) = {device.platform for device in devices} or {None}
  if platform != "gpu":
    return platform
  # A process has GPUs of one make.
  return "cuda" if nvidia.is_available() else None


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


Sums = tuple[jax.Array, jax.Array]
"""low and high, as of `segments.integer_sums`."""

Cut = Callable[[jax.Array], jax.Array]
"""Returns the rows of an array [B, ...] that belong to some of the tiles."""


def sums_by_parts(
  words_of_some: Callable[[Cut], tuple[jax.Array, jax.Array]],
  num_tiles: int,
  num_segments: int,
  most_rows: int,
) -> Sums:
  """Sums words by segment; only those of some tiles are stored at a time.

  The words of all tiles would take more than twice as much memory as the
  sub-vectors.

  Args:
    words_of_some: returns the words of some tiles, [b, 1024, W] int32 as for
      `segments.integer_sums`, and the segments of their rows, [b, 1024] int32.
    num_tiles: B.
    num_segments: K.
    most_rows: rows within which those of a segment lie.

  Returns:
    low and high, [K, W] int32, as of `segments.integer_sums`.
  """
  size = min(num_tiles, max(_LEAST_TILES, -(-num_tiles // _MOST_PARTS)))

  def sums_of_part(first: jax.Array) -> Sums:
    # The last part begins among tiles that were added before.
    start = jnp.minimum(first, num_tiles - size)
    words, owners = words_of_some(
      lambda array: lax.dynamic_slice_in_dim(array, start, size)
    )
    is_new = start + jnp.arange(size, dtype=jnp.int32) >= first
    return segments.integer_sums(
      words.reshape(-1, words.shape[2]),
      jnp.where(is_new[:, None], owners, num_segments).reshape(-1),
      num_segments,
      most_added=min(most_rows, size * TILE),
    )

  firsts = jnp.arange(0, num_tiles, size, dtype=jnp.int32)
  zeros = jax.tree.map(
    lambda some: jnp.zeros(some.shape, some.dtype),
    jax.eval_shape(sums_of_part, firsts[0]),
  )

  def add(sums: Sums, first: jax.Array) -> tuple[Sums, None]:
    return jax.tree.map(jnp.add, sums, sums_of_part(first)), None

  return lax.scan(add, zeros, firsts)[0]


def layer_sums(
  layout: Layout,
  columns: Sequence[jax.Array],
  most_rows: int,
  axis_name: str | None,
  *,
  power: int = 1,
) -> jax.Array:
  """Sums columns, or their squares, over each layer, exactly: [L, C].

  Args:
    layout: says which layer a tile belongs to.
    columns: C arrays [B, 1024] float32, 0 where there is no sub-vector.
    most_rows: rows of the largest layer on one device, padding included.
    axis_name: name of the `shard_map` axis over which the tiles are spread, or
      None.
    power: 1, or 2 for sums of squares.
  """
  scale = segments.power_of_two(_largest(layout, columns, axis_name) ** power)

  def words_of_some(cut: Cut) -> tuple[jax.Array, jax.Array]:
    layers = cut(layout.layers)
    values = jnp.stack([cut(column) for column in columns], 2) ** power
    words = segments.to_words(values / scale[layers][:, None])
    return words, jnp.broadcast_to(layers[:, None], words.shape[:2])

  sums = sums_by_parts(
    words_of_some, len(layout.layers), scale.shape[0], most_rows
  )
  if axis_name is not None:
    sums = lax.psum(sums, axis_name)
  return segments.from_words(segments.merge(*sums)) * scale


def layer_scales(
  layout: Layout, columns: Sequence[jax.Array], axis_name: str | None
) -> jax.Array:
  """Returns the power of two above each layer's largest entries, [L, C]."""
  return segments.power_of_two(_largest(layout, columns, axis_name))


def _largest(
  layout: Layout, columns: Sequence[jax.Array], axis_name: str | None
) -> jax.Array:
  """Returns the largest absolute value of each layer's columns, [L, C]."""
  of_tiles = [jnp.abs(column).max(axis=1) for column in columns]
  largest = jax.ops.segment_max(
    jnp.stack(of_tiles, 1), layout.layers, layout.sizes.size
  )
  return largest if axis_name is None else lax.pmax(largest, axis_name)

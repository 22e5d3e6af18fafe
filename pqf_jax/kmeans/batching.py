"""The sub-vectors of one or several layers in one set of blocks.

They are cut into blocks of 1024; a block belongs to one layer, and what pads a
layer's last block counts for nothing.
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

from pqf_jax.kmeans import assignment
from pqf_jax.numerics import segments


class Places(NamedTuple):
  """Which sub-vectors there are.

  Attributes:
    layers: [B] int32, the layer of each block. Each device has its share of
      every layer, one layer after the other.
    filled: [B] int32, the sub-vectors of each block.
    sizes: [L] float32, N of each layer.
  """

  layers: jax.Array
  filled: jax.Array
  sizes: jax.Array


class Packed(NamedTuple):
  """The sub-vectors of L layers, in blocks.

  Attributes:
    blocks: [B, 1024, D] float32, zeros behind a layer's last sub-vector.
    places: which of them are sub-vectors, and of which layer.
  """

  blocks: jax.Array
  places: Places


def pack(layers: Sequence[jax.Array], *, num_shards: int = 1) -> Packed:
  """Packs sub-vectors [N_l, D] of each layer.

  Args:
    layers: one array a layer, of the same D.
    num_shards: devices over which the blocks will be spread; the number of
      blocks of one layer becomes a multiple of it.

  Returns:
    The blocks; all but their content is known without running anything.
  """
  counts = [vectors.shape[0] for vectors in layers]
  bounds = block_bounds(counts, num_shards)
  blocks, owners, filled = [], [], []
  for index, vectors in enumerate(layers):
    shape = num_shards, bounds[index + 1] - bounds[index]
    padding = math.prod(shape) * assignment.BLOCK - counts[index]
    padded = jnp.pad(vectors, ((0, padding), (0, 0)))
    blocks.append(padded.reshape(*shape, assignment.BLOCK, vectors.shape[1]))
    starts = np.arange(math.prod(shape)).reshape(shape) * assignment.BLOCK
    owners.append(np.full(shape, index, np.int32))
    filled.append(np.clip(counts[index] - starts, 0, assignment.BLOCK))
  joined = jnp.concatenate(blocks, axis=1).astype(jnp.float32)
  places = Places(
    layers=jnp.asarray(np.concatenate(owners, axis=1).reshape(-1)),
    filled=jnp.asarray(np.concatenate(filled, axis=1).reshape(-1), jnp.int32),
    sizes=jnp.asarray(counts, jnp.float32),
  )
  return Packed(joined.reshape(-1, *joined.shape[2:]), places)


def block_bounds(counts: Sequence[int], num_shards: int = 1) -> list[int]:
  """First block of each layer on every device, and the number of all: [L + 1].

  Args:
    counts: N of each layer.
    num_shards: devices.
  """
  unit = assignment.BLOCK * num_shards
  return np.cumsum([0, *(-(-count // unit) for count in counts)]).tolist()


def places_of_rows(
  rows: jax.Array, counts: Sequence[int], *, num_shards: int = 1
) -> jax.Array:
  """Where in [B * 1024] the given rows of each layer are, [L, K] both."""
  bounds = (
    np.array(block_bounds(counts, num_shards), np.int32) * assignment.BLOCK
  )
  on_each = np.diff(bounds)[:, None]
  return rows // on_each * bounds[-1] + bounds[:-1, None] + rows % on_each


def unpack(
  values: jax.Array, counts: Sequence[int], *, num_shards: int = 1
) -> list[jax.Array]:
  """[N_l] of each layer, of [B, 1024] packed as `pack` does."""
  shares = values.reshape(num_shards, -1, values.shape[1])
  bounds = block_bounds(counts, num_shards)
  return [
    shares[:, first:end].reshape(-1)[:count]
    for count, (first, end) in zip(
      counts, itertools.pairwise(bounds), strict=True
    )
  ]


def inside(places: Places) -> jax.Array:
  """[B, 1024] bool: which entries are sub-vectors, not padding."""
  place = jnp.arange(assignment.BLOCK, dtype=jnp.int32)
  return place[None] < places.filled[:, None]


def totals(
  places: Places,
  values: jax.Array,
  *,
  most_rows: int,
  axis_name: str | None = None,
) -> jax.Array:
  """Sums [B, 1024, C] of each layer, [L, C], exactly.

  Args:
    places: says which layer a block belongs to.
    values: float32, 0 where there is no sub-vector.
    most_rows: of a layer on one device, padding included.
    axis_name: of the devices over which the blocks are spread (`shard_map`).
  """
  scale = scales(places, values, axis_name=axis_name)
  words = segments.to_words(values / scale[places.layers][:, None])
  sums = segments.word_sums(
    words.reshape(-1, words.shape[2]),
    jnp.repeat(places.layers, assignment.BLOCK),
    scale.shape[0],
    most_added=most_rows,
    axis_name=axis_name,
  )
  return segments.from_words(sums) * scale


def scales(
  places: Places, values: jax.Array, *, axis_name: str | None = None
) -> jax.Array:
  """The power of two above each layer's largest entries, [L, C]."""
  largest = jax.ops.segment_max(
    jnp.abs(values).max(axis=1), places.layers, places.sizes.size
  )
  if axis_name is not None:
    largest = lax.pmax(largest, axis_name)
  return segments.power_of_two(largest)

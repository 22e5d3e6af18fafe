"""The sub-vectors of one or several layers in one set of blocks.

They are cut into blocks of 1024; a block belongs to one layer, and what pads a
layer's last block counts for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pqf_jax.ops import nearest, segments


class Places(NamedTuple):
  """Which sub-vectors there are.

  Attributes:
    layers: [B] int32, the layer of each block; a layer's blocks are adjacent.
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
  places = Places(
    layers=jnp.asarray(np.concatenate(owners)),
    filled=jnp.asarray(np.concatenate(filled)),
    sizes=jnp.asarray([vectors.shape[0] for vectors in layers], jnp.float32),
  )
  return Packed(jnp.concatenate(blocks).astype(jnp.float32), places)


def inside(places: Places) -> jax.Array:
  """[B, 1024] bool: which entries are sub-vectors, not padding."""
  place = jnp.arange(nearest.BLOCK, dtype=jnp.int32)
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
    jnp.repeat(places.layers, nearest.BLOCK),
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

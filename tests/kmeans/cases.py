"""Arrays, and one small shape whose programs the tests of k-means share.

A program is compiled for the number of tiles, D, K, T and the method: all calls
with up to 1024 sub-vectors of length D share one for each method.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pqf_jax import kmeans
from pqf_jax.kmeans import annealing, batching, loop

D, K, T = 4, 16, 20
N = 300
"""Few enough a centroid for Hartigan's rule."""

annealed = functools.partial(kmeans.annealed_kmeans, num_codes=K, num_steps=T)
lloyd = functools.partial(kmeans.lloyd_kmeans, num_codes=K, num_steps=T)


def normal(*shape, seed=0, scale=0.02, shift=0.0):
  draws = np.random.default_rng(seed).standard_normal(shape)
  return (draws * scale + shift).astype(np.float32)


def squared_distances(vectors, codebook):
  vectors, codebook = np.float64(vectors), np.float64(codebook)
  return ((vectors[:, None] - codebook[None]) ** 2).sum(axis=2)


def fit(vectors, start, normals, method):
  """The loop for one layer, from a given start and given normal numbers."""
  num_last = method.num_hartigan_steps(T)
  batch = batching.make_batch([jnp.asarray(vectors)])
  num_tiles = len(batch.tiles)
  options = loop.Options(
    most_rows=num_tiles * batching.TILE,
    num_hartigan_steps=num_last,
    num_hartigan_tiles=num_tiles if method.assigns_by_hartigan else 0,
  )
  fitted = loop.fit(
    loop.prepare(batch, options=options),
    jnp.asarray(start)[None],
    annealing.make_schedule(T - num_last, [method]),
    jnp.asarray(normals, jnp.bfloat16)[:, None],
    options=options,
  )
  return kmeans.KMeansResult(
    fitted.codebooks[0],
    fitted.codes.reshape(-1)[: len(vectors)],
    fitted.distortion[0],
    fitted.variance[0],
  )


def assert_same(left, right):
  """Asserts that codes and codebook are the same, to the bit."""
  np.testing.assert_array_equal(left.codes, right.codes)
  np.testing.assert_array_equal(left.codebook, right.codebook)


def split_keys(count):
  return jax.random.split(jax.random.key(0), count)


def scored(length, num_codes, num_layers, num_tiles):
  """(columns, tables, layers) and the codes that brute force finds."""
  vectors = normal(num_tiles, batching.TILE, length)
  codebooks = normal(num_layers, num_codes, length, seed=1)
  layers = np.sort(np.arange(num_tiles) % num_layers).astype(np.int32)
  squares = np.square(codebooks).sum(axis=2, keepdims=True)
  tables = np.concatenate([squares, -2 * codebooks], axis=2)
  columns = batching.split_columns(jnp.asarray(vectors))
  codes = [
    squared_distances(tile, codebooks[layer]).argmin(axis=1)
    for tile, layer in zip(vectors, layers, strict=True)
  ]
  return (columns, jnp.asarray(tables), jnp.asarray(layers)), np.stack(codes)

"""Outliers: a few sub-vectors far from all others, with codewords of their own.

One entry of 1e5 among entries of 1 spoils what k-means takes from the data as a
whole: noise of the size of their standard deviation empties most clusters, the
mean is no centre, and sums with a resolution of 2^-29 of the largest entry lose
the others. The error is least with a codeword for each of so few; so k-means
runs on the rest, and sees no outliers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pqf_jax.kmeans import batching, devices

FAR = 32.0
"""How much farther from the centre outliers are than all but K - 1 others. Far
more than in heavy tails, as those of Student's t of two degrees of freedom."""

LARGEST = 1e15
"""Squared distances of larger sub-vectors could overflow float32."""

# Sub-vectors of which the centre is the median.
_NUM_SAMPLED = 1024


class Outliers(NamedTuple):
  """The outliers among N sub-vectors, in G groups that share a codeword.

  Attributes:
    rows: which sub-vectors, ascending, [n].
    rest: the others, [N - n].
    between: those of `rest` that are farther than all but K - 1, ascending.
    groups: the group of each outlier, [n].
    centroids: [G, D] float32, the mean of each group.
  """

  rows: np.ndarray
  rest: np.ndarray
  between: np.ndarray
  groups: np.ndarray
  centroids: np.ndarray


def find(layers: Sequence[jax.Array], num_codes: int) -> list[Outliers | None]:
  """Finds the outliers of each layer; None where it has none.

  Outliers are fewer than K, and at most a quarter of the layer. They are at
  least `FAR` times as far from the centre as the others, in the largest entry,
  and have most of the sum of its squares.

  Args:
    layers: arrays [N, D]. None has outliers while jax traces, nor where a part
      of a layer is in another process.
    num_codes: K.
  """
  if not all(map(_is_here, layers)):
    return [None] * len(layers)
  platform = batching.platform_of(layers)
  distances, num_far = devices.on_one(platform, _distances, tuple(layers))
  bounds = batching.tile_bounds([len(vectors) for vectors in layers])
  found: list[Outliers | None] = []
  for i, far in enumerate(jax.device_get(num_far)):
    most = _most(layers[i], num_codes)
    # Layers without outliers, nearly all, copy no distances to the host.
    if far > most:
      found.append(None)
      continue
    away = np.asarray(distances[bounds[i] : bounds[i + 1]]).reshape(-1)
    found.append(_outliers(layers[i], away[: len(layers[i])], most))
  return found


def any_on_a_device(
  layers: Sequence[jax.Array], num_codes: int, mesh: Mesh
) -> bool:
  """Whether `find` may find any in [devices, N, D] of `devices.stack`."""
  num_far = jax.device_get(devices.on_each(mesh, _num_far, tuple(layers)))
  return any(
    (far <= _most(vectors, num_codes)).any()
    for vectors, far in zip(layers, num_far.T, strict=True)
  )


def _num_far(layers: tuple[jax.Array, ...]) -> jax.Array:
  return _distances(layers)[1]


def _most(vectors: jax.Array, num_codes: int) -> int:
  """Returns how many outliers a layer [..., N, D] may have."""
  return min(num_codes - 1, vectors.shape[-2] // 4)


def _is_here(vectors: jax.Array) -> bool:
  if isinstance(vectors, jax.core.Tracer):
    return False
  return not isinstance(vectors, jax.Array) or vectors.is_fully_addressable


@jax.jit
def _distances(layers: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
  """Returns each sub-vector's largest distance in an entry, [B, 1024] float32.

  It is from the median of a sample of its layer, and lies as in a batch. No
  floats are added up, so every platform gets the same bits. Also returns how
  many of a layer are less than `FAR` times nearer than the farthest, [L] int32;
  0 where a distance is NaN.

  All layers share each operation, since compilers take long for 36 of them.
  """
  tiles, layout = batching.make_batch(layers)
  num_layers, owners = len(layers), layout.layers
  away = jnp.abs(tiles - _medians(layers)[owners][:, None]).max(axis=2)
  inside = batching.mask(layout)
  away = jnp.where(inside, away, 0)
  largest = jax.ops.segment_max(away.max(axis=1), owners, num_layers)
  is_far = inside & (FAR * away >= largest[owners][:, None])
  num_far = is_far.sum(axis=1, dtype=jnp.int32)
  return away, jax.ops.segment_sum(num_far, owners, num_layers)


def _medians(layers: Sequence[jax.Array]) -> jax.Array:
  """Returns the median of a sample of each layer, [L, D] float32."""
  samples = [
    vectors[:: -(-vectors.shape[0] // _NUM_SAMPLED)] for vectors in layers
  ]
  most = max(map(len, samples))
  ends = [((0, most - len(sample)), (0, 0)) for sample in samples]
  padded = [  # NaN comes last
    jnp.pad(sample.astype(jnp.float32), end, constant_values=jnp.nan)
    for sample, end in zip(samples, ends, strict=True)
  ]
  ordered = jnp.sort(jnp.stack(padded), axis=1)
  middles = np.array([len(sample) // 2 for sample in samples])
  return ordered[np.arange(len(samples)), middles]


def _outliers(
  vectors: jax.Array, distances: np.ndarray, most: int
) -> Outliers | None:
  """Returns the outliers of a layer, at most `most`, from their distances."""
  place = len(distances) - 1 - most
  usual = np.partition(distances, place)[place]
  limit = FAR * usual
  # Also False for NaN.
  if not limit < distances.max() < LARGEST:
    return None
  is_far = distances > limit
  squares = np.square(distances, dtype=np.float64)
  rows, rest = np.flatnonzero(is_far), np.flatnonzero(~is_far)
  if squares[rows].sum() < squares[rest].sum():
    return None
  far = np.asarray(jnp.asarray(vectors)[rows], np.float64)
  groups = _groups(far, float(np.sqrt(squares[rest].mean())))
  members = groups == np.arange(groups.max() + 1)[:, None]
  centroids = members @ far / members.sum(axis=1, keepdims=True)
  between = np.flatnonzero((distances > usual) & ~is_far)
  return Outliers(rows, rest, between, groups, centroids.astype(np.float32))


def join(
  outliers: Outliers,
  vectors: jax.Array,
  num_codes: int,
  rest: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Returns the result for a layer, from that for the rest of it.

  Args:
    outliers: of the layer.
    vectors: [N, D], the layer.
    num_codes: K.
    rest: codebook, of at most K - G codewords, codes and distortion.

  Returns:
    codebook [K, D], codes [N], distortion and variance, on the devices of the
    codebook. Codewords that are left over repeat the last.
  """
  rows, groups, between = outliers.rows, outliers.groups, outliers.between
  first = rest[0].shape[0]
  data = np.asarray(vectors, np.float32)
  codebook = np.concatenate([rest[0], outliers.centroids])
  codes = np.empty(len(data), np.int32)
  codes[outliers.rest], codes[rows] = rest[1], first + groups
  before = _squares(data[between], codebook[codes[between]])
  # A few of the rest may be nearer to a group than to any other codeword.
  codes[between] = _squares(data[between, None], codebook[None]).argmin(axis=1)
  change = _squares(data[between], codebook[codes[between]]) - before
  error = _squares(data[rows], codebook[codes[rows]]).sum()
  distortion = np.float64(rest[2]) * len(outliers.rest) + error
  distortion[-1] += change.sum()
  spare = ((0, num_codes - len(codebook)), (0, 0))
  return jax.device_put(
    (
      np.pad(codebook, spare, mode="edge"),
      codes,
      np.float32(distortion / len(data)),
      np.float32(data.var(dtype=np.float64)),
    ),
    rest[0].sharding,
  )


def _squares(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
  """Returns the squared distances of sub-vectors from centroids."""
  return np.square(np.float64(vectors) - centroids).sum(axis=-1)


def _groups(vectors: np.ndarray, radius: float) -> np.ndarray:
  """Numbers groups: all within `radius` of the first who is in none yet."""
  groups = np.full(len(vectors), -1)
  for row, vector in enumerate(vectors):
    if groups[row] < 0:
      near = np.abs(vectors - vector).max(axis=1) <= radius
      groups[near & (groups < 0)] = groups.max() + 1
  return groups

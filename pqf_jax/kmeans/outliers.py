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

from pqf_jax.kmeans import devices

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
  distances, num_far = _distances(tuple(layers))
  found = []
  for vectors, away, far in zip(
    layers, distances, jax.device_get(num_far), strict=True
  ):
    most = _most(vectors, num_codes)
    # Layers without outliers, nearly all, copy no distances to the host.
    some = far <= most
    found.append(_outliers(vectors, np.asarray(away), most) if some else None)
  return found


def any_on_a_device(
  layers: Sequence[jax.Array], num_codes: int, mesh: Mesh
) -> bool:
  """Whether `find` may find any in [devices, N, D] of `devices.stack`."""
  num_far = jax.device_get(devices.on_each(mesh, _num_far, tuple(layers)))
  return any(
    (far <= _most(vectors, num_codes)).any()
    for vectors, far in zip(layers, num_far, strict=True)
  )


def _num_far(layers: tuple[jax.Array, ...]) -> list[jax.Array]:
  return _distances(layers)[1]


def _most(vectors: jax.Array, num_codes: int) -> int:
  """Returns how many outliers a layer [..., N, D] may have."""
  return min(num_codes - 1, vectors.shape[-2] // 4)


def _is_here(vectors: jax.Array) -> bool:
  if isinstance(vectors, jax.core.Tracer):
    return False
  return not isinstance(vectors, jax.Array) or vectors.is_fully_addressable


@jax.jit
def _distances(
  layers: tuple[jax.Array, ...],
) -> tuple[list[jax.Array], list[jax.Array]]:
  """Returns each sub-vector's largest distance in an entry, [N] float32.

  It is from the median of a sample. No floats are added up, so every platform
  gets the same bits. Also returns how many are less than `FAR` times nearer
  than the farthest; 0 where a distance is NaN.
  """
  distances, num_far = [], []
  for vectors in layers:
    sample = vectors[:: -(-vectors.shape[0] // _NUM_SAMPLED)]
    middle = jnp.sort(sample, axis=0)[sample.shape[0] // 2]
    away = vectors.astype(jnp.float32) - middle.astype(jnp.float32)[None]
    distances.append(jnp.abs(away).max(axis=1))
    is_far = FAR * distances[-1] >= distances[-1].max()
    num_far.append(is_far.sum(dtype=jnp.int32))
  return distances, num_far


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

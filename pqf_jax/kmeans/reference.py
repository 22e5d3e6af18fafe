"""SR-C k-means as this library runs it, in plain NumPy: read this first.

`pqf_jax.kmeans.kmeans` has the formulas. This is one layer without tiles, exact
sums, backends or devices; the tests compare the two.
"""

import numpy as np

from pqf_jax.kmeans import annealing, empty_clusters


def kmeans(
  vectors: np.ndarray,
  start: np.ndarray,
  normals: np.ndarray,
  method: annealing.Method,
  num_steps: int,
) -> tuple[np.ndarray, np.ndarray, list[float]]:
  """Fits K centroids to N sub-vectors of length D in T steps.

  Args:
    vectors: [N, D] sub-vectors.
    start: [K, D], the first centroids.
    normals: draws of a standard normal, [K, D] for each annealed step.
    method: from `annealing.method(N, D, K)`, or `annealing.LLOYD`.
    num_steps: T, of which `method.num_hartigan_steps(T)` are not annealed.

  Returns:
    The codebook [K, D], codes [N], and T + 1 mean squared errors.
  """
  num_last = method.num_hartigan_steps(num_steps)
  schedule = annealing.make_schedule(num_steps - num_last, [method])
  weight = annealing.HARTIGAN_WEIGHT * method.assigns_by_hartigan
  (count, length), num_codes = vectors.shape, len(start)
  offset = vectors.mean(axis=0)
  vectors, codebook = vectors - offset, start - offset
  deviation = np.sqrt(np.square(vectors).sum(axis=0) / max(count - 1, 1))
  codes = distances(vectors, codebook).argmin(axis=1)
  velocity, errors = np.zeros_like(codebook), []
  counts = np.full(num_codes, count / num_codes)
  for noise, momentum, normal in zip(*schedule, normals, strict=True):
    codes = assigned(vectors, codebook, counts, codes, weight)
    squares, counts, means = statistics(vectors, codebook, codes)
    errors.append(squares.sum() / count)
    # The i-th empty cluster goes beside the cluster of the i-th largest error.
    empty, source = counts == 0, np.arange(num_codes)
    source[empty] = np.argsort(-squares, kind="stable")[: empty.sum()]
    means, counts = means[source], np.maximum(counts, 1)[source]
    spread = np.sqrt(squares[source] / counts / length)
    spread = np.where(empty, empty_clusters.SPLIT_OFFSET * spread, 0)
    scale = noise * deviation / np.sqrt(counts)[:, None]
    ahead = means + momentum * (means - codebook + velocity)
    ahead = np.where(empty[:, None], means, ahead)
    velocity = np.where(empty[:, None], 0, ahead - codebook)
    codebook = ahead + np.maximum(scale, spread[:, None]) * normal
  for turn in range(num_last):
    moved = assigned(vectors, codebook, counts, codes, 1.0)
    # Half of them at a time: each is judged as if it moved alone.
    codes = np.where(np.arange(count) % 2 == turn % 2, moved, codes)
    _, counts, means = statistics(vectors, codebook, codes)
    codebook = np.where(counts[:, None] > 0, means, codebook)
    errors.append(statistics(vectors, codebook, codes)[0].sum() / count)
  codes = distances(vectors, codebook).argmin(axis=1)
  errors.append(statistics(vectors, codebook, codes)[0].sum() / count)
  return codebook + offset, codes, errors


def distances(vectors: np.ndarray, codebook: np.ndarray) -> np.ndarray:
  """Returns all squared distances, [N, K]."""
  return np.square(vectors[:, None] - codebook[None]).sum(axis=2)


def assigned(
  vectors: np.ndarray,
  codebook: np.ndarray,
  counts: np.ndarray,
  codes: np.ndarray,
  weight: float,
) -> np.ndarray:
  """Returns codes [N] by Hartigan's rule; nearest centroids at weight 0."""
  joining = np.where(counts > 0, counts / (counts + weight), np.inf)
  # The last member pays nothing.
  leaving = counts / np.where(counts > weight, counts - weight, np.inf)
  stays = codes[:, None] == np.arange(len(counts))
  factors = np.where(stays, leaving, joining)
  return (distances(vectors, codebook) * factors).argmin(axis=1)


def statistics(
  vectors: np.ndarray, codebook: np.ndarray, codes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns each cluster's squared error [K], size [K] and mean [K, D]."""
  member = (codes[:, None] == np.arange(len(codebook))).astype(float)
  counts = member.sum(axis=0)
  means = member.T @ vectors / np.maximum(counts, 1)[:, None]
  return (member * distances(vectors, codebook)).sum(axis=0), counts, means

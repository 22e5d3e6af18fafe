"""K-means by stochastic relaxation (SR-C), the quantizer of PQF.

Martinez et al., "Permute, Quantize, and Fine-tune", CVPR 2021 (arXiv
2010.15703), section 3.3, after Zeger, Vaisey and Gersho (1992). N sub-vectors
x of length D, K centroids c. Step t = 1..T assigns every x to its nearest
centroid, and moves the centroids to

    c_j = mean_{x in j}(x) + a_t * std * z_j / sqrt(n_j),     z_j ~ N(0, I)

where a_t = sqrt(1 - t / T), n_j is the number of sub-vectors of cluster j, and
std is the standard deviation of each of the D dimensions over the data. The
paper adds noise a_t * std * z to the *data* before taking the mean; the mean of
n_j such draws is the formula above, exactly in distribution, with K * D normal
numbers a step instead of N * D. The last step has no noise (a_T = 0).

Assignment is exact float32 without N x K memory (`pqf_jax.ops.nearest`).
NVIDIA: `segment_sum` adds in an order that varies, so two runs may differ by
rounding; and jaxlib 0.10.2 and 0.11.0 compile it into a slow compare-and-swap
loop unless `XLA_FLAGS` has `--xla_gpu_ftz=true`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pqf_jax import errors
from pqf_jax.ops import nearest

# Offset of a re-seeded centroid from its donor's mean, in units of the donor
# cluster's root mean squared distance per dimension. 0.1 to 1 score alike.
_SPLIT_OFFSET = 0.3

# Squared distances of larger sub-vectors could overflow float32.
_LARGEST = 1e15


class KMeansResult(NamedTuple):
  """What k-means returns: `vectors` is close to `codebook[codes]`.

  Attributes:
    codebook: [K, D] float32 centroids.
    codes: [N] int32, nearest centroid of every sub-vector in `codebook`.
    distortion: [T + 1] float32, squared error of a sub-vector (summed over D,
      averaged over N). Entry t is measured before step t + 1, the last entry
      is that of the returned (codebook, codes).
  """

  codebook: jax.Array
  codes: jax.Array
  distortion: jax.Array


class Clusters(NamedTuple):
  """One assignment and its cluster statistics; the data mean is at 0.

  Attributes:
    vectors: [N, D] float32 sub-vectors, centred.
    codes: [N] int32 nearest centroids.
    distances: [N] float32 squared distances to them.
    codebook: [K, D] float32 centroids that were assigned to.
    means: [K, D] float32 cluster means; 0 where a cluster is empty.
    counts: [K] float32 cluster sizes.
    errors: [K] float32 sums of the clusters' squared distances.
  """

  vectors: jax.Array
  codes: jax.Array
  distances: jax.Array
  codebook: jax.Array
  means: jax.Array
  counts: jax.Array
  errors: jax.Array


class Proposal(NamedTuple):
  """Where the next centroids go, before the noise of the schedule.

  Attributes:
    centroids: [K, D] float32.
    counts: [K] float32 cluster sizes that scale the noise, at least 1.
    spread: [K, 1] float32 standard deviation of a further random offset.
  """

  centroids: jax.Array
  counts: jax.Array
  spread: jax.Array


def annealed_kmeans(
  key: jax.Array, vectors: jax.Array, *, num_codes: int, num_steps: int
) -> KMeansResult:
  """Runs SR-C k-means (see the module docstring) from random sub-vectors.

  Empty clusters are re-seeded by `split_worst`. The result depends only on the
  arguments; one compilation serves all calls with the same N, D, `num_codes`
  and `num_steps`. Works under `jit` and `vmap` (then without the check for
  NaN), and on `vectors` sharded along N.

  Args:
    key: PRNG key, consumed.
    vectors: [N, D] sub-vectors, any real type; computed in float32. D is
      unrolled in the compiled code: meant for D <= 32, slow beyond 100.
    num_codes: K, between 1 and N; need not be a power of two.
    num_steps: T, at least 1. On 3x3 layers T = 300 ends within 0.4 % of the
      squared error of the authors' rule at T = 1000, T = 100 within 1.4 %, on
      1x1 layers within 1.9 % and 5 % (benchmarks/kmeans_quality.py).

  Returns:
    The codebook, codes that match it, and the error of every step.

  Raises:
    InputError: `vectors` is not a matrix, holds NaN or values beyond 1e15, has
      fewer than `num_codes` rows, or a count is below 1.
  """
  vectors = _checked(vectors, num_codes, num_steps)
  return _run(key, vectors, annealing_schedule(num_steps), num_codes)


def lloyd_kmeans(
  key: jax.Array, vectors: jax.Array, *, num_codes: int, num_steps: int
) -> KMeansResult:
  """Runs plain k-means (Lloyd, 1982): `annealed_kmeans` without its noise.

  Its error never increases, but ends 0.3 % (131072 sub-vectors) to 20 % (4096)
  above the annealed one.

  Args:
    key: PRNG key, consumed.
    vectors: [N, D] sub-vectors, any real type; computed in float32.
    num_codes: K, between 1 and N.
    num_steps: T, at least 1.

  Returns:
    The codebook, codes that match it, and the error of every step.

  Raises:
    InputError: as `annealed_kmeans`.
  """
  vectors = _checked(vectors, num_codes, num_steps)
  return _run(key, vectors, np.zeros(num_steps, np.float32), num_codes)


def annealing_schedule(num_steps: int) -> np.ndarray:
  """Returns a_t = sqrt(1 - t / T) for t = 1..T, [T] float32, on the host.

  Inside `jit` rounding makes `1 - t / T` negative at t = T for some T (10 and
  1000 among them), and its root NaN.
  """
  steps = np.arange(1, num_steps + 1, dtype=np.float64)
  return np.sqrt(1 - steps / num_steps).astype(np.float32)


@functools.partial(jax.jit, static_argnames="num_codes")
def random_start(
  key: jax.Array, vectors: jax.Array, *, num_codes: int
) -> jax.Array:
  """Returns K rows of `vectors` drawn without replacement, [K, D]."""
  # The K largest of N random numbers: 50 times faster than jax.random.choice,
  # which sorts all of them.
  draws = jax.random.uniform(key, vectors.shape[:1], jnp.float32)
  return vectors[lax.top_k(draws, num_codes)[1]]


def split_worst(clusters: Clusters) -> Proposal:
  """Re-seeds empty clusters next to the clusters with the largest error.

  The i-th empty cluster moves to the mean of the cluster with the i-th largest
  sum of squared distances, plus a Gaussian offset of 0.3 times that cluster's
  root mean squared distance per dimension. Others move to their mean.

  Why this rule: squared error after 100 steps relative to the authors' rule
  (an empty cluster's centroid becomes 0), ResNet-18 kernels, K = 256, mean of 4
  seeds with a standard deviation of 0.006 or less (0.03 for keeping). Last
  column: this rule after 1000 steps, relative to theirs after 1000
  (benchmarks/kmeans_quality.py).

  | layer, N, D              | keep  | farthest | largest | worst | T=1000 |
  |--------------------------|-------|----------|---------|-------|--------|
  | layer1.0.conv1, 4096, 9  | 1.098 | 0.991    | 1.000   | 0.988 | 0.997  |
  | layer1.1.conv1, 2048, 18 | 1.190 | 1.004    | 0.982   | 0.982 | 0.993  |
  | layer2.0.down, 2048, 4   | 1.388 | 1.000    | 1.004   | 0.999 | 1.002  |
  | layer2.0.conv1, 8192, 9  | 1.049 | 1.005    | 0.999   | 0.999 | 1.000  |
  | layer3.0.conv1, 16384, 18| 1.001 | 1.000    | 1.000   | 1.000 | 1.000  |
  | layer4.0.conv1, 131072, 9| 1.000 | 1.000    | 1.000   | 1.000 | 1.000  |
  """
  return split(clusters, clusters.errors)


def split(clusters: Clusters, priority: jax.Array) -> Proposal:
  """Re-seeds empty clusters next to those with the highest `priority` [K]."""
  num_codes, length = clusters.means.shape
  empty = clusters.counts == 0
  donors = lax.top_k(priority, num_codes)[1]
  # The i-th empty cluster takes the i-th donor; the others take themselves.
  rank = jnp.maximum(jnp.cumsum(empty, dtype=jnp.int32) - 1, 0)
  own = jnp.arange(num_codes, dtype=donors.dtype)
  source = jnp.where(empty, donors[rank], own)
  counts = jnp.maximum(clusters.counts, 1)[source]
  spread = _SPLIT_OFFSET * jnp.sqrt(clusters.errors[source] / counts / length)
  return Proposal(
    centroids=clusters.means[source],
    counts=counts,
    spread=jnp.where(empty, spread, 0)[:, None],
  )


@functools.partial(jax.jit, static_argnames="reseed")
def fit(
  vectors: jax.Array,
  start: jax.Array,
  schedule: jax.Array,
  normals: jax.Array,
  *,
  reseed: Callable[[Clusters], Proposal] = split_worst,
) -> KMeansResult:
  """Runs one step of k-means for every entry of `schedule`.

  Deterministic; all randomness is in `start` and `normals`.

  Args:
    vectors: [N, D] float32.
    start: [K, D] float32, the first centroids.
    schedule: [T] float32, a_t of the module docstring.
    normals: [T, K, D] float32 draws of a standard normal.
    reseed: the rule that places the centroids of empty clusters.

  Returns:
    The codebook, codes that match it, and the error of every step.
  """
  # The data mean is moved to 0: the scores of `nearest` cancel less there.
  offset = vectors.mean(axis=0, keepdims=True)
  vectors = vectors - offset
  deviation = vectors.std(
    axis=0, keepdims=True, ddof=min(1, vectors.shape[0] - 1)
  )
  columns = nearest.split_columns(vectors)
  norms = jnp.square(vectors).sum(axis=1)

  def step(
    codebook: jax.Array, inputs: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, jax.Array]:
    amount, normal = inputs
    codes, scores = nearest.nearest_centroid(columns, codebook)
    # A tiny distance may round below 0.
    distances = jnp.maximum(scores + norms, 0)
    proposal = reseed(_clusters(vectors, codes, distances, codebook))
    noise = amount * deviation / jnp.sqrt(proposal.counts)[:, None]
    scale = jnp.hypot(noise, proposal.spread)
    return proposal.centroids + scale * normal, distances.mean()

  codebook, distortion = lax.scan(step, start - offset, (schedule, normals))
  codes, _ = nearest.nearest_centroid(columns, codebook)
  last = jnp.square(vectors - codebook[codes]).sum(axis=1).mean()
  return KMeansResult(codebook + offset, codes, jnp.append(distortion, last))


def _clusters(
  vectors: jax.Array,
  codes: jax.Array,
  distances: jax.Array,
  codebook: jax.Array,
) -> Clusters:
  """Returns the cluster statistics of one assignment."""
  # One sum over D + 2 columns: three sums of their own take 126 us more of 374
  # at N = 262144, D = 9, K = 256 on an H200.
  ones = jnp.ones_like(distances)
  columns = jnp.concatenate(
    [vectors, ones[:, None], distances[:, None]], axis=1
  )
  totals = jax.ops.segment_sum(columns, codes, codebook.shape[0])
  counts = totals[:, -2]
  return Clusters(
    vectors=vectors,
    codes=codes,
    distances=distances,
    codebook=codebook,
    means=totals[:, :-2] / jnp.maximum(counts, 1)[:, None],
    counts=counts,
    errors=totals[:, -1],
  )


def _run(
  key: jax.Array, vectors: jax.Array, schedule: np.ndarray, num_codes: int
) -> KMeansResult:
  """Draws the start and all normal numbers, and runs `fit`."""
  start_key, normals_key = jax.random.split(key)
  start = random_start(start_key, vectors, num_codes=num_codes)
  # Drawn here because their code takes a third of the compile time: it depends
  # on (T, K, D) only, so layers of different N share it.
  normals = jax.random.normal(
    normals_key, (len(schedule), num_codes, vectors.shape[1]), jnp.float32
  )
  return fit(vectors, start, schedule, normals)


def _checked(vectors: jax.Array, num_codes: int, num_steps: int) -> jax.Array:
  """Returns `vectors` as float32, or raises InputError."""
  shape = np.shape(vectors)
  if len(shape) != 2 or shape[1] < 1:
    raise errors.InputError(
      f"k-means: vectors has shape {list(shape)}; reshape it to [number of"
      " sub-vectors, length of a sub-vector]."
    )
  if not 1 <= num_codes <= shape[0]:
    raise errors.InputError(
      f"k-means: num_codes = {num_codes} with {shape[0]} sub-vectors; it must"
      f" be between 1 and {shape[0]}."
    )
  if num_steps < 1:
    raise errors.InputError(
      f"k-means: num_steps = {num_steps}; it must be at least 1."
    )
  vectors = jnp.asarray(vectors).astype(jnp.float32)
  if isinstance(vectors, jax.core.Tracer) or not vectors.is_fully_addressable:
    return vectors
  bad_rows = np.flatnonzero(~(np.abs(vectors) < _LARGEST).all(axis=1))
  if bad_rows.size:
    raise errors.InputError(
      f"k-means: {bad_rows.size} of {shape[0]} sub-vectors hold NaN or values"
      f" beyond {_LARGEST:g}, the first at row {bad_rows[0]}; take weights of"
      " a training run that did not diverge."
    )
  return vectors

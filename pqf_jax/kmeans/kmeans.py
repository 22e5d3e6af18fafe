"""K-means by stochastic relaxation (SR-C), the quantizer of PQF.

Martinez et al., "Permute, Quantize, and Fine-tune", CVPR 2021 (arXiv
2010.15703), section 3.3, after Zeger, Vaisey and Gersho (1992). N sub-vectors
x of length D, K centroids c. Step t = 1..T assigns every x to its nearest
centroid, and moves the centroids to

    c_j = mean_{x in j}(x) + a_t * std * z_j / sqrt(n_j),     z_j ~ N(0, I)

where a_t = a * sqrt(1 - t / T), n_j is the number of sub-vectors of cluster j,
and std is the standard deviation of each of the D dimensions over the data. The
paper adds noise a_t * std * z to the *data* before taking the mean; the mean of
n_j such draws is the formula above, exactly in distribution, with K * D normal
numbers a step instead of N * D. The last step has no noise (a_T = 0).

Four things differ from the paper (`annealing.method`). With them 100 steps end
with 0.3 % less squared error than the authors' rule (a = 1, an empty cluster's
centroid becomes 0) after 1000, on the mean of 14 layers, and 1000 with 0.8 %
less (docs/kmeans_quality.md):

- The amplitude a, 1 in the paper, grows with the size of clusters.
- Centroids go further than the mean, by a part of the way to it and of their
  last move: over-relaxation (Lee, Baek and Sung, 1997) and momentum.
- Where clusters are small, steps assign by Hartigan's rule
  (`pqf_jax.kmeans.hartigan`) with half its weight: it accounts for the share
  that a sub-vector has in its own centroid.
- The last steps are Hartigan's, with full weight and without noise.

A few sub-vectors far from all others get codewords of their own, and all this
runs on the rest (`pqf_jax.kmeans.outliers`).

Assignment is exact float32 without N x K memory (`pqf_jax.kmeans.assignment`),
sums are exact (`pqf_jax.numerics.segments`): a result is the same at every run,
on any number of devices of one kind, and whichever layers share a call.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pqf_jax import errors
from pqf_jax.kmeans import annealing, batching, devices, loop, outliers


class KMeansResult(NamedTuple):
  """The result of k-means: `vectors` is close to `codebook[codes]`.

  Attributes:
    codebook: [K, D] float32 centroids.
    codes: [N] int32, nearest centroid of every sub-vector in `codebook`.
    distortion: [T + 1] float32, squared error of a sub-vector (summed over D,
      averaged over N). Entry t is measured in step t + 1: after its assignment
      and before the centroids move, but after their move if the step is
      Hartigan's. The last entry is that of the returned (codebook, codes).
    variance: [] float32, of the N * D entries of the sub-vectors.
  """

  codebook: jax.Array
  codes: jax.Array
  distortion: jax.Array
  variance: jax.Array


def annealed_kmeans(
  key: jax.Array,
  vectors: jax.Array,
  *,
  num_codes: int,
  num_steps: int,
  mesh: Mesh | None = None,
) -> KMeansResult:
  """Runs SR-C k-means (see the module docstring) from random sub-vectors.

  `empty_clusters.split_worst` places the centroids of empty clusters. The
  result depends only on the arguments; one compilation serves all calls with
  the same N, D, `num_codes` and `num_steps`. Works under `jit` and `vmap`, then
  without the check for NaN and the care for outliers.

  Args:
    key: PRNG key, consumed.
    vectors: [N, D] sub-vectors, any real type; computed in float32. D is
      unrolled in the compiled code: meant for D <= 32, slow beyond 100.
    num_codes: K, between 1 and N; need not be a power of two.
    num_steps: T, at least 1.
    mesh: devices over which the sub-vectors are spread; None: the devices that
      hold them. The result is the same on any number of devices of one kind.

  Returns:
    The codebook, codes that match it, and the error of every step.

  Raises:
    InputError: `vectors` is not a matrix, holds NaN or values beyond 1e15, has
      fewer than `num_codes` rows, or a count is below 1.
  """
  vectors = _checked(vectors, num_codes, num_steps)
  return kmeans_of_layers(
    key[None], [vectors], num_codes=num_codes, num_steps=num_steps, mesh=mesh
  )[0]


def lloyd_kmeans(
  key: jax.Array,
  vectors: jax.Array,
  *,
  num_codes: int,
  num_steps: int,
  mesh: Mesh | None = None,
) -> KMeansResult:
  """Runs plain k-means (Lloyd, 1982): no noise, momentum or Hartigan's rule.

  Its error never increases, but ends 0.3 % (131072 sub-vectors) to 20 % (4096)
  above the annealed one.

  Arguments, results and errors are those of `annealed_kmeans`.
  """
  vectors = _checked(vectors, num_codes, num_steps)
  return kmeans_of_layers(
    key[None],
    [vectors],
    num_codes=num_codes,
    num_steps=num_steps,
    annealed=False,
    mesh=mesh,
  )[0]


def kmeans_of_layers(
  keys: jax.Array,
  layers: Sequence[jax.Array],
  *,
  num_codes: int,
  num_steps: int,
  annealed: bool = True,
  mesh: Mesh | None = None,
  donate: bool = False,
) -> list[KMeansResult]:
  """Runs k-means on several sets of sub-vectors in one program.

  A set's codebook and codes are, to the bit, those of a call with this set
  alone (not under a `jit` of the caller, where they may differ by rounding).
  Small sets then cost as much as their sub-vectors, not a dozen launches a
  step.

  Args:
    keys: [L] PRNG keys, consumed.
    layers: L arrays [N_l, D] of one D, each with at least K rows; not checked.
    num_codes: K.
    num_steps: T, at least 0.
    annealed: False: plain k-means.
    mesh: devices over which each set is spread; None: the devices over which
      the sets are spread already, or one that holds a copy.
    donate: whether sets may be deleted once they are copied, which saves their
      memory during the steps.

  Returns:
    One result for each set.
  """
  if mesh is None:
    layers = [batching.on_one_device(vectors) for vectors in layers]
    mesh = batching.mesh_of(layers)
  run = functools.partial(
    _run_all,
    num_steps=num_steps,
    annealed=annealed,
    mesh=mesh,
    donate=donate,
  )
  results: dict[int, KMeansResult] = {}
  for i, found in enumerate(outliers.find(layers, num_codes)):
    if found is not None:
      most = min(num_codes - len(found.centroids), len(found.rest))
      rest = jnp.asarray(layers[i])[found.rest]
      fitted = run(keys[i : i + 1], [rest], num_codes=most)[0]
      joined = outliers.join(found, layers[i], num_codes, fitted[:3])
      results[i] = KMeansResult(*joined)
  usual = [i for i in range(len(layers)) if i not in results]
  if usual:
    chosen = [layers[i] for i in usual]
    fits = run(_take(keys, usual), chosen, num_codes=num_codes)
    results.update(zip(usual, fits, strict=True))
  return [results[i] for i in range(len(layers))]


def kmeans_on_each_device(
  keys: jax.Array,
  layers: Sequence[jax.Array],
  *,
  num_codes: int,
  num_steps: int,
  annealed: bool = True,
  mesh: Mesh,
  donate: bool = False,
) -> list[KMeansResult] | None:
  """Runs k-means on layers of every device, by one program for all devices.

  A layer's codebook and codes are, to the bit, those of `kmeans_of_layers`.

  Args:
    keys: [devices, L] PRNG keys, consumed.
    layers: L arrays [devices, N_l, D], as `devices.stack` makes them.
    num_codes: see `kmeans_of_layers`, as all that follow.
    num_steps: T.
    annealed: False: plain k-means.
    mesh: the devices.
    donate: whether the layers may be deleted.

  Returns:
    A result for each of the L, with a leading axis of the devices; None where a
    layer has outliers, for which `kmeans_of_layers` cares.
  """
  if outliers.any_on_a_device(layers, num_codes, mesh):
    return None
  return _run_all(
    keys,
    layers,
    num_codes=num_codes,
    num_steps=num_steps,
    annealed=annealed,
    mesh=mesh,
    donate=donate,
    apart=True,
  )


def _run_all(
  keys: jax.Array,
  layers: Sequence[jax.Array],
  *,
  num_codes: int,
  num_steps: int,
  annealed: bool,
  mesh: Mesh | None,
  donate: bool,
  apart: bool = False,
) -> list[KMeansResult]:
  """Runs k-means on layers without outliers."""
  methods = [annealing.LLOYD] * len(layers)
  if annealed:
    length = layers[0].shape[-1]
    counts = [vectors.shape[-2] for vectors in layers]
    methods = [annealing.method(n, length, num_codes) for n in counts]
  # Layers that are assigned by Hartigan's rule come first, as `Options` asks.
  order = sorted(
    range(len(layers)), key=lambda i: not methods[i].assigns_by_hartigan
  )
  layers, methods = [layers[i] for i in order], [methods[i] for i in order]
  results = _run(
    _take(keys, order),
    layers,
    methods,
    num_codes,
    num_steps,
    mesh,
    donate,
    apart,
  )
  return [results[order.index(i)] for i in range(len(layers))]


def _take(keys: jax.Array, places: Sequence[int]) -> jax.Array:
  """Returns the keys at some places; compiles one program at most."""
  if list(places) == list(range(keys.shape[-1])):
    return keys
  return _gather(keys, np.array(places))


@jax.jit
def _gather(keys: jax.Array, places: jax.Array) -> jax.Array:
  return keys[..., places]


def _run(
  keys: jax.Array,
  layers: Sequence[jax.Array],
  methods: Sequence[annealing.Method],
  num_codes: int,
  num_steps: int,
  mesh: Mesh | None,
  donate: bool,
  apart: bool,
) -> list[KMeansResult]:
  """Runs k-means on layers in the order of their tiles."""
  num_shards = 1 if mesh is None or apart else mesh.size
  platform = batching.platform_of(layers)
  call = functools.partial(devices.on_one, platform)
  if mesh is not None and apart:
    call = functools.partial(devices.on_each, mesh)
  counts = tuple(vectors.shape[-2] for vectors in layers)
  bounds = batching.tile_bounds(counts, num_shards)
  num_last = methods[0].num_hartigan_steps(num_steps)
  num_annealed = num_steps - num_last
  options = loop.Options(
    most_rows=int(np.diff(bounds).max()) * batching.TILE,
    num_hartigan_steps=num_last,
    num_hartigan_tiles=bounds[sum(m.assigns_by_hartigan for m in methods)],
    platform=platform,
  )
  batch, starts = call(
    _batch_and_starts,
    keys,
    tuple(layers),
    num_codes=num_codes,
    num_shards=num_shards,
  )
  if donate:
    for vectors in layers:
      vectors.delete()
  prepared = loop.prepare(batch, options=options, mesh=mesh, apart=apart)
  del batch
  schedule = annealing.make_schedule(num_annealed, methods)
  if apart:  # the same on each device
    schedule = jax.tree.map(
      lambda leaf: np.broadcast_to(leaf, (len(keys), *leaf.shape)), schedule
    )
  normals = call(
    draw_normals,
    keys,
    num_steps=num_annealed,
    num_codes=num_codes,
    length=layers[0].shape[-1],
  )
  fitted = loop.fit(
    prepared,
    starts,
    schedule,
    normals,
    options=options,
    mesh=mesh,
    apart=apart,
  )
  return call(_results, fitted, counts=counts, num_shards=num_shards)


def random_rows(
  keys: jax.Array, counts: Sequence[int], num_codes: int
) -> jax.Array:
  """Draws K different rows of each layer, one of each K-th part; [L, K] int32.

  Every row is as likely as any other, up to the rounding of N / K. Unlike a
  draw without replacement this needs K numbers, not N of them and a sort.

  Args:
    keys: [L] PRNG keys.
    counts: N of each layer.
    num_codes: K.
  """
  keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
  parts = np.arange(num_codes + 1, dtype=np.int64)
  bounds = np.array(counts, np.int64)[:, None] * parts // num_codes
  draw = functools.partial(
    jax.random.randint, shape=(num_codes,), dtype=jnp.int32
  )
  # One draw of all: the compiler takes a third of a second for each.
  return jax.vmap(lambda key, low, high: draw(key, minval=low, maxval=high))(
    keys, bounds[:, :-1].astype(np.int32), bounds[:, 1:].astype(np.int32)
  )


@functools.partial(
  jax.jit, static_argnames=("num_steps", "num_codes", "length")
)
def draw_normals(
  keys: jax.Array, num_steps: int, num_codes: int, length: int
) -> jax.Array:
  """Draws normal numbers, [T, L, K, D]; a layer's depend on its key only.

  It is a separate program because it depends on (T, K, D) only, so calls with
  different N share it. 8 bits of a random offset are enough, and make products
  with them exact in `loop`.
  """
  shape = num_steps, num_codes, length

  def draw(key: jax.Array) -> jax.Array:
    # The same numbers as in that shape, but XLA:CPU unrolls a short last axis:
    # 16 take 3.3 s to compile instead of .3.
    count = (math.prod(shape),)
    normals = jax.random.normal(jax.random.fold_in(key, 1), count, jnp.float32)
    return normals.astype(jnp.bfloat16)

  normals = jax.vmap(draw)(keys).reshape(len(keys), *shape)
  return jnp.moveaxis(normals, 0, 1)


@functools.partial(jax.jit, static_argnames=("num_codes", "num_shards"))
def _batch_and_starts(
  keys: jax.Array,
  layers: tuple[jax.Array, ...],
  num_codes: int,
  num_shards: int,
) -> tuple[batching.Batch, jax.Array]:
  """Returns the layers in tiles, and their first centroids, [L, K, D]."""
  counts = [vectors.shape[0] for vectors in layers]
  rows = batching.rows_in_batch(
    random_rows(keys, counts, num_codes), counts, num_shards=num_shards
  )
  batch = batching.make_batch(layers, num_shards=num_shards)
  return batch, batch.tiles.reshape(-1, batch.tiles.shape[2])[rows]


@functools.partial(jax.jit, static_argnames=("counts", "num_shards"))
def _results(
  fitted: loop.Fitted, counts: tuple[int, ...], num_shards: int
) -> list[KMeansResult]:
  codes = batching.split_batch(fitted.codes, counts, num_shards=num_shards)
  return [
    KMeansResult(*result)
    for result in zip(
      fitted.codebooks, codes, fitted.distortion, fitted.variance, strict=True
    )
  ]


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
  bad_rows = np.flatnonzero(~(np.abs(vectors) < outliers.LARGEST).all(axis=1))
  if bad_rows.size:
    raise errors.InputError(
      f"k-means: {bad_rows.size} of {shape[0]} sub-vectors hold NaN or values"
      f" beyond {outliers.LARGEST:g}, the first at row {bad_rows[0]}; take"
      " weights of a training run that did not diverge."
    )
  return vectors

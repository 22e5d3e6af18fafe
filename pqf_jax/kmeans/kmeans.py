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

Four things are not the paper's (`annealing.method`). With them 100 steps end
with 0.3 % less squared error than the authors' rule (a = 1, an empty cluster's
centroid becomes 0) after 1000, on the mean of 14 layers, and 1000 with 0.8 %
less (docs/kmeans_quality.md):

- The amplitude a, 1 in the paper, is larger where clusters are.
- Centroids go further than the mean, by a part of the way to it and of their
  last move: over-relaxation (Lee, Baek and Sung, 1997) and momentum.
- Where clusters are small, a sub-vector is assigned with regard to what it
  contributes to its own centroid, half as much as in a transfer.
- The last steps are transfers (`pqf_jax.kmeans.hartigan`).

Assignment is exact float32 without N x K memory (`pqf_jax.kmeans.assignment`),
sums are exact (`pqf_jax.numerics.segments`): a result is the same at every run,
on any number of devices of one kind, and whichever layers share a call.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pqf_jax import errors
from pqf_jax.kmeans import annealing, assignment, batching, iteration, loop

LARGEST = 1e15
"""Squared distances of larger sub-vectors could overflow float32."""


class KMeansResult(NamedTuple):
  """What k-means returns: `vectors` is close to `codebook[codes]`.

  Attributes:
    codebook: [K, D] float32 centroids.
    codes: [N] int32, nearest centroid of every sub-vector in `codebook`.
    distortion: [T + 1] float32, squared error of a sub-vector (summed over D,
      averaged over N). Entry t is measured before step t + 1, the last entry
      is that of the returned (codebook, codes).
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

  Empty clusters are re-seeded by `reseeding.split_worst`. The result depends
  only on the arguments; one compilation serves all calls with the same N, D,
  `num_codes` and `num_steps`. Works under `jit` and `vmap`, then without the
  check for NaN.

  Args:
    key: PRNG key, consumed.
    vectors: [N, D] sub-vectors, any real type; computed in float32. D is
      unrolled in the compiled code: meant for D <= 32, slow beyond 100.
    num_codes: K, between 1 and N; need not be a power of two.
    num_steps: T, at least 1.
    mesh: devices over which the sub-vectors are spread; None: those that hold
      them. The result is the same on any number of devices of one kind.

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
  """Runs plain k-means (Lloyd, 1982), without noise, momentum or transfers.

  Its error never increases, but ends 0.3 % (131072 sub-vectors) to 20 % (4096)
  above the annealed one.

  Args:
    key: PRNG key, consumed.
    vectors: [N, D] sub-vectors, any real type; computed in float32.
    num_codes: K, between 1 and N.
    num_steps: T, at least 1.
    mesh: as `annealed_kmeans`.

  Returns:
    The codebook, codes that match it, and the error of every step.

  Raises:
    InputError: as `annealed_kmeans`.
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
) -> list[KMeansResult]:
  """Runs k-means on several sets of sub-vectors in one program.

  A set's codebook and codes are, to the bit, those of a call with this set
  alone (not under a `jit` of the caller, where they may differ by rounding).
  Small sets then cost what their sub-vectors cost, not a dozen launches a step.

  Args:
    keys: [L] PRNG keys, consumed.
    layers: L arrays [N_l, D] of one D, each with at least K rows; not checked.
    num_codes: K.
    num_steps: T, at least 0.
    annealed: False: plain k-means.
    mesh: devices over which each set is spread; None: those over which the sets
      are spread already, or one that holds a copy.

  Returns:
    One result a set.
  """
  if mesh is None:
    layers = [_one_copy(vectors) for vectors in layers]
    mesh = _mesh_of(layers)
  methods = [
    annealing.method(*vectors.shape, num_codes) if annealed else annealing.LLOYD
    for vectors in layers
  ]
  # Blocks of layers that weigh their own come first, as `Options` asks.
  order = sorted(range(len(layers)), key=lambda i: not methods[i].weighs_own)
  layers, methods = [layers[i] for i in order], [methods[i] for i in order]
  found = _run(
    keys[np.array(order)], layers, methods, num_codes, num_steps, mesh
  )
  return [found[order.index(i)] for i in range(len(layers))]


def _run(
  keys: jax.Array,
  layers: Sequence[jax.Array],
  methods: Sequence[annealing.Method],
  num_codes: int,
  num_steps: int,
  mesh: Mesh | None,
) -> list[KMeansResult]:
  """`kmeans_of_layers`, of layers in the order of their blocks."""
  num_shards = 1 if mesh is None else mesh.size
  counts = tuple(vectors.shape[0] for vectors in layers)
  bounds = batching.block_bounds(counts, num_shards)
  packed, starts = _packed(keys, tuple(layers), num_codes, num_shards)
  last = methods[0].num_transfers(num_steps)
  num_moves = num_steps - last
  fitted = loop.fit(
    packed,
    starts,
    annealing.make_schedule(num_moves, methods),
    _normals(keys, num_moves, num_codes, layers[0].shape[1]),
    options=iteration.Options(
      most_rows=int(np.diff(bounds).max()) * assignment.BLOCK,
      num_transfers=last,
      num_own_blocks=bounds[sum(method.weighs_own for method in methods)],
    ),
    mesh=mesh,
  )
  return _unpacked(fitted, counts, num_shards)


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
  parts = np.arange(num_codes + 1, dtype=np.int64)
  bounds = np.array(counts, np.int64)[:, None] * parts // num_codes
  draw = functools.partial(
    jax.random.randint, shape=(num_codes,), dtype=jnp.int32
  )
  # One draw of all: the compiler takes a third of a second for each.
  return jax.vmap(lambda key, low, high: draw(key, minval=low, maxval=high))(
    keys, bounds[:, :-1].astype(np.int32), bounds[:, 1:].astype(np.int32)
  )


def _one_copy(vectors: jax.Array) -> jax.Array:
  """One of the copies, if every device of several has all of `vectors`."""
  if isinstance(vectors, jax.core.Tracer) or not isinstance(vectors, jax.Array):
    return vectors
  copies = len(vectors.sharding.device_set)
  if copies > 1 and vectors.is_fully_replicated:
    return vectors.addressable_data(0)
  return vectors


def _mesh_of(layers: Sequence[jax.Array]) -> Mesh | None:
  """The devices over which the layers are spread, if these are several.

  A kernel cannot be divided among devices by the compiler.
  """
  devices = {
    device
    for vectors in layers
    if isinstance(vectors, jax.Array)
    and not isinstance(vectors, jax.core.Tracer)
    for device in vectors.sharding.device_set
  }
  if len(devices) < 2:
    return None
  return Mesh(sorted(devices, key=lambda device: device.id), ("devices",))


@functools.partial(jax.jit, static_argnames=("num_codes", "num_shards"))
def _packed(
  keys: jax.Array,
  layers: tuple[jax.Array, ...],
  num_codes: int,
  num_shards: int,
) -> tuple[batching.Packed, jax.Array]:
  """The layers in blocks, and their first centroids, [L, K, D]."""
  counts = [vectors.shape[0] for vectors in layers]
  keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
  rows = random_rows(keys, counts, num_codes)
  places = batching.places_of_rows(rows, counts, num_shards=num_shards)
  packed = batching.pack(layers, num_shards=num_shards)
  return packed, packed.blocks.reshape(-1, packed.blocks.shape[2])[places]


@functools.partial(
  jax.jit, static_argnames=("num_steps", "num_codes", "length")
)
def _normals(
  keys: jax.Array, num_steps: int, num_codes: int, length: int
) -> jax.Array:
  """[L] keys -> [T, L, K, D] normal numbers; a layer's depend on its key only.

  A program of its own because it takes a third of the compile time, and
  depends on (T, K, D) only, so calls with different N share it. 8 bits of a
  random offset are enough, and make `relaxation` exact.
  """

  def draw(key: jax.Array) -> jax.Array:
    shape = num_steps, num_codes, length
    normals = jax.random.normal(jax.random.fold_in(key, 1), shape, jnp.float32)
    return normals.astype(jnp.bfloat16)

  return jax.vmap(draw, out_axes=1)(keys)


@functools.partial(jax.jit, static_argnames=("counts", "num_shards"))
def _unpacked(
  fitted: iteration.Fitted, counts: tuple[int, ...], num_shards: int
) -> list[KMeansResult]:
  codes = batching.unpack(fitted.codes, counts, num_shards=num_shards)
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
  bad_rows = np.flatnonzero(~(np.abs(vectors) < LARGEST).all(axis=1))
  if bad_rows.size:
    raise errors.InputError(
      f"k-means: {bad_rows.size} of {shape[0]} sub-vectors hold NaN or values"
      f" beyond {LARGEST:g}, the first at row {bad_rows[0]}; take weights of"
      " a training run that did not diverge."
    )
  return vectors

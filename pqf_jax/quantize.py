"""Stage 2: quantizes kernels to `VQArray`s, by annealed k-means in batches."""

import functools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import sharding

from pqf_jax import errors, kmeans
from pqf_jax.core import blocks, trees, vq_array
from pqf_jax.core import plan as plans

PyTree = Any

# Weights of the layers that share a batch; a single layer may have more. 25
# million need about 1 GB on the device.
_MOST_WEIGHTS = 1 << 25
_TINY = float(np.finfo(np.float32).tiny)
# Of a kernel's largest weight: beyond, float32 loses squares or small weights.
_LARGEST_WEIGHT = 1e-15, 1e12


class LayerSummary(NamedTuple):
  """Error of quantizing one kernel.

  Attributes:
    path: of the kernel.
    distortion: mean squared error of a weight over the kernel's variance, each
      averaged over stacked layers; 0 is lossless, 1 as bad as replacing every
      weight by the mean.
    distortion_by_step: [steps] mean squared error of a sub-vector at each
      k-means step, averaged likewise.
  """

  path: str
  distortion: float
  distortion_by_step: np.ndarray


def quantize_params(
  key: jax.Array,
  variables: PyTree,
  plan: plans.CompressionPlan,
  *,
  annealed: bool = True,
  mesh: sharding.Mesh | None = None,
  on_layer: Callable[[LayerSummary], None] = lambda summary: None,
) -> tuple[PyTree, dict[str, LayerSummary]]:
  """Learns a codebook and codes for every kernel of the plan.

  Section 3.3 of arXiv 2010.15703 (SR-C). A layer's result depends on the key,
  its path, its place in a stack and its weights only, not on the other layers.
  Layers with the same (D, K, steps) run as one program; programs are compiled
  side by side.

  Args:
    key: random number generator key, consumed.
    variables: dense variable tree.
    plan: which kernels, and how.
    annealed: False runs plain k-means (Lloyd), for comparison.
    mesh: devices of this process over which a layer of more than 2^25 weights
      is spread, with the same result; smaller layers run on one device.
    on_layer: called once for each layer, for progress.

  Returns:
    (variables with `VQArray`s, {path: LayerSummary}).

  Raises:
    InputError: weights that are NaN, infinite, or all too small or too large
      for k-means in float32; before any work.
  """
  vq_array.check_dense(variables)
  flat = trees.flatten(variables)
  for path in plan:
    trees.check_finite(path, flat[path])
    _check_range(path, flat[path])
  layers = {
    path: [
      _Layer(path, place, layer.spec.layer_shape(flat[path].shape))
      for place in range(math.prod(layer.spec.stack_shape(flat[path].shape)))
    ]
    for path, layer in plan.items()
  }
  run = functools.partial(_quantize, key, flat, plan, annealed)
  results: dict[tuple[str, int], _Result] = {}
  nodes: dict[str, vq_array.VQArray] = {}
  summaries: dict[str, LayerSummary] = {}

  def keep(done: dict[tuple[str, int], _Result]) -> None:
    results.update(done)
    for path in dict.fromkeys(path for path, _ in done):
      places = [(one.path, one.place) for one in layers[path]]
      if all(place in results for place in places):
        nodes[path], summaries[path] = _join(
          path, flat[path], plan[path].spec, [results.pop(p) for p in places]
        )
        on_layer(summaries[path])

  # A large layer is alone in its batch. One batch at a time: devices that
  # communicate must all get their programs in the same order.
  spread = mesh is not None and mesh.size > 1
  small = []
  for batch in _batches(layers, plan):
    if spread and batch[0].size > _MOST_WEIGHTS:
      keep(run(batch, mesh))
    else:
      small.append(batch)
  with futures.ThreadPoolExecutor(max(1, len(small))) as pool:
    for future in futures.as_completed([pool.submit(run, b) for b in small]):
      keep(future.result())
  return trees.replace(variables, nodes), {
    path: summaries[path] for path in plan
  }


class _Layer(NamedTuple):
  """One layer: a kernel, or the part of a stack at this place."""

  path: str
  place: int
  shape: tuple[int, ...]

  @property
  def size(self) -> int:
    return math.prod(self.shape)


class _Result(NamedTuple):
  """What k-means gives for one layer; see `kmeans.KMeansResult`."""

  codebook: jax.Array
  codes: jax.Array
  distortion: np.ndarray
  variance: float


def _check_range(path: str, kernel: trees.Array) -> None:
  largest = float(np.abs(kernel).max(initial=0))
  least, most = _LARGEST_WEIGHT
  if largest and not least <= largest <= most:
    raise errors.InputError(
      f"{path} has weights up to {largest:g}; k-means takes {least:g} to "
      f"{most:g}: scale the kernel, or keep it dense (num_codes=None)"
    )


def _batches(
  layers: Mapping[str, list[_Layer]], plan: plans.CompressionPlan
) -> Iterator[list[_Layer]]:
  """Yields layers of equal (D, K, steps), up to `_MOST_WEIGHTS` together."""
  kinds: dict[tuple[int, int, int], list[_Layer]] = {}
  for path, layer in plan.items():
    _, _, length = layer.spec.layout(layers[path][0].shape)
    kind = (length, layer.num_codes, layer.kmeans_steps)
    kinds.setdefault(kind, []).extend(layers[path])
  for kind_layers in kinds.values():
    batch: list[_Layer] = []
    size = 0
    for one in kind_layers:
      if batch and size + one.size > _MOST_WEIGHTS:
        yield batch
        batch, size = [], 0
      batch.append(one)
      size += one.size
    yield batch


def _quantize(
  key: jax.Array,
  flat: Mapping[str, trees.Array],
  plan: plans.CompressionPlan,
  annealed: bool,
  batch: list[_Layer],
  mesh: sharding.Mesh | None = None,
) -> dict[tuple[str, int], _Result]:
  """Quantizes layers of equal (D, K, steps)."""
  chosen = [plan[layer.path] for layer in batch]
  specs = tuple(layer.spec for layer in chosen)
  kernels = tuple(
    jax.device_put(spec.take_layer(flat[layer.path], layer.place))
    for layer, spec in zip(batch, specs, strict=True)
  )
  results = kmeans.kmeans_of_layers(
    _keys(key, batch, specs),
    _to_vectors(kernels, specs),
    num_codes=chosen[0].num_codes,
    num_steps=chosen[0].kmeans_steps,
    annealed=annealed,
    mesh=mesh,
    donate=True,
  )
  if mesh is not None:  # the codes are still spread
    results = jax.device_put(results, jax.local_devices()[0])
  shapes = tuple(kernel.shape for kernel in kernels)
  code_dtype = vq_array.code_dtype(chosen[0].num_codes)
  codes = _to_codes([r.codes for r in results], specs, shapes, code_dtype)
  # One transfer for all layers; it also waits for them.
  lost = jax.device_get([(r.distortion, r.variance) for r in results])
  return {
    (layer.path, layer.place): _Result(
      results[i].codebook.astype(kernels[i].dtype), codes[i], *lost[i]
    )
    for i, layer in enumerate(batch)
  }


def _keys(
  key: jax.Array, batch: list[_Layer], specs: tuple[blocks.BlockSpec, ...]
) -> jax.Array:
  """Returns a key for each layer, by its path and its place in a stack."""
  hashes = [zlib.crc32(layer.path.encode()) for layer in batch]
  fold = jax.vmap(jax.random.fold_in, (None, 0))
  keys = fold(key, np.array(hashes, np.uint32))
  stacked = np.array([bool(spec.stack_axes) for spec in specs])
  if not stacked.any():
    return keys
  places = np.array([layer.place for layer in batch], np.uint32)
  return jnp.where(stacked, jax.vmap(jax.random.fold_in)(keys, places), keys)


def _join(
  path: str, kernel: trees.Array, spec: blocks.BlockSpec, parts: list[_Result]
) -> tuple[vq_array.VQArray, LayerSummary]:
  """Makes one node of a kernel's layers."""

  def stack(leaves: list[jax.Array]) -> jax.Array:
    if not spec.stack_axes:
      return leaves[0]
    shape = spec.stack_shape(kernel.shape)
    return jnp.stack(leaves).reshape(*shape, *leaves[0].shape)

  node = vq_array.stack_layers(
    stack([part.codebook for part in parts]),
    stack([part.codes for part in parts]),
    spec.layer_shape(kernel.shape),
    spec,
  )
  by_step = np.mean([part.distortion for part in parts], axis=0)
  # A constant kernel has no variance, and no error either.
  variance = float(np.mean([part.variance for part in parts]))
  length = parts[0].codebook.shape[1]
  distortion = float(by_step[-1]) / length / max(variance, _TINY)
  return node, LayerSummary(path, distortion, by_step)


@functools.partial(jax.jit, static_argnums=1)
def _to_vectors(
  kernels: tuple[jax.Array, ...], specs: tuple[blocks.BlockSpec, ...]
) -> tuple[jax.Array, ...]:
  """Cuts each kernel into its sub-vectors [N, D]."""
  cut = [spec.to_blocks(k) for k, spec in zip(kernels, specs, strict=True)]
  return tuple(b.reshape(-1, b.shape[2]) for b in cut)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _to_codes(
  codes: list[jax.Array],
  specs: tuple[blocks.BlockSpec, ...],
  shapes: tuple[tuple[int, ...], ...],
  dtype: jnp.dtype,
) -> list[jax.Array]:
  """Reshapes the codes [N] of each kernel to [C_out, M], in their own type."""
  return [
    c.reshape(spec.layout(shape)[:2]).astype(dtype)
    for c, spec, shape in zip(codes, specs, shapes, strict=True)
  ]

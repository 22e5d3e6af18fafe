"""Stage 2: quantizes kernels to `VQArray`s, by annealed k-means in batches."""

import functools
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
# Of a kernel's largest weight: beyond, float32 loses squares or small weights.
_LARGEST_WEIGHT = 1e-15, 1e12


class LayerSummary(NamedTuple):
  """Error of quantizing one kernel.

  Attributes:
    path: of the kernel.
    distortion: mean squared error of a weight over the kernel's variance; 0 is
      lossless, 1 as bad as replacing every weight by the mean.
    distortion_by_step: [steps] mean squared error of a sub-vector at each
      k-means step.
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
  its path and its weights only, not on the other layers. Layers with the same
  (D, K, steps) run as one program; programs are compiled side by side.

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
  run = functools.partial(_quantize, key, flat, plan, annealed)
  nodes: dict[str, vq_array.VQArray] = {}
  summaries: dict[str, LayerSummary] = {}

  def keep(quantized: list[tuple[vq_array.VQArray, LayerSummary]]) -> None:
    for node, summary in quantized:
      nodes[summary.path], summaries[summary.path] = node, summary
      on_layer(summary)

  batches = list(_batches(flat, plan))
  # A large layer is alone in its batch. One batch at a time: devices that
  # communicate must all get their programs in the same order.
  spread = mesh is not None and mesh.size > 1
  large = [b for b in batches if spread and flat[b[0]].size > _MOST_WEIGHTS]
  for paths in large:
    keep(run(paths, mesh))
  small = [paths for paths in batches if paths not in large]
  with futures.ThreadPoolExecutor(max(1, len(small))) as pool:
    for done in futures.as_completed([pool.submit(run, b) for b in small]):
      keep(done.result())
  return trees.replace(variables, nodes), {
    path: summaries[path] for path in plan
  }


def _check_range(path: str, kernel: trees.Array) -> None:
  largest = float(np.abs(kernel).max(initial=0))
  least, most = _LARGEST_WEIGHT
  if largest and not least <= largest <= most:
    raise errors.InputError(
      f"{path} has weights up to {largest:g}; k-means takes {least:g} to "
      f"{most:g}: scale the kernel, or keep it dense (num_codes=None)"
    )


def _batches(
  flat: Mapping[str, jax.Array], plan: plans.CompressionPlan
) -> Iterator[tuple[str, ...]]:
  """Yields paths of equal (D, K, steps), up to `_MOST_WEIGHTS` together."""
  kinds: dict[tuple[int, int, int], list[str]] = {}
  for path, layer in plan.items():
    _, _, length = layer.spec.layout(flat[path].shape)
    kind = (length, layer.num_codes, layer.kmeans_steps)
    kinds.setdefault(kind, []).append(path)
  for paths in kinds.values():
    batch: list[str] = []
    size = 0
    for path in paths:
      if batch and size + flat[path].size > _MOST_WEIGHTS:
        yield tuple(batch)
        batch, size = [], 0
      batch.append(path)
      size += flat[path].size
    yield tuple(batch)


def _quantize(
  key: jax.Array,
  flat: Mapping[str, jax.Array],
  plan: plans.CompressionPlan,
  annealed: bool,
  paths: tuple[str, ...],
  mesh: sharding.Mesh | None = None,
) -> list[tuple[vq_array.VQArray, LayerSummary]]:
  """Quantizes a batch of layers of equal (D, K, steps)."""
  kernels = tuple(jnp.asarray(flat[path]) for path in paths)
  specs = tuple(plan[path].spec for path in paths)
  layers = _to_vectors(kernels, specs)
  num_codes, length = plan[paths[0]].num_codes, layers[0].shape[1]
  hashes = np.array([zlib.crc32(path.encode()) for path in paths], np.uint32)
  results = kmeans.kmeans_of_layers(
    jax.vmap(jax.random.fold_in, (None, 0))(key, hashes),
    layers,
    num_codes=num_codes,
    num_steps=plan[paths[0]].kmeans_steps,
    annealed=annealed,
    mesh=mesh,
    donate=True,
  )
  if mesh is not None:  # the codes are still spread
    results = jax.device_put(results, jax.local_devices()[0])
  shapes = tuple(kernel.shape for kernel in kernels)
  codes = _to_codes([result.codes for result in results], specs, shapes)
  # One transfer for all layers; it also waits for them.
  lost = jax.device_get([(r.distortion, r.variance) for r in results])
  quantized = []
  for i, path in enumerate(paths):
    distortion_by_step, variance = lost[i]
    node = vq_array.VQArray(
      results[i].codebook.astype(kernels[i].dtype),
      codes[i].astype(vq_array.code_dtype(num_codes)),
      kernels[i].shape,
      specs[i],
    )
    # A constant kernel has no variance, and no error either.
    variance = max(float(variance), np.finfo(np.float32).tiny)
    distortion = float(distortion_by_step[-1]) / length / variance
    quantized.append((node, LayerSummary(path, distortion, distortion_by_step)))
  return quantized


@functools.partial(jax.jit, static_argnums=1)
def _to_vectors(
  kernels: tuple[jax.Array, ...], specs: tuple[blocks.BlockSpec, ...]
) -> tuple[jax.Array, ...]:
  """Cuts each kernel into its sub-vectors [N, D]."""
  cut = [spec.to_blocks(k) for k, spec in zip(kernels, specs, strict=True)]
  return tuple(b.reshape(-1, b.shape[2]) for b in cut)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _to_codes(
  codes: list[jax.Array],
  specs: tuple[blocks.BlockSpec, ...],
  shapes: tuple[tuple[int, ...], ...],
) -> list[jax.Array]:
  """Reshapes the codes [N] of each kernel to [C_out, M]."""
  return [
    c.reshape(spec.layout(shape)[:2])
    for c, spec, shape in zip(codes, specs, shapes, strict=True)
  ]

"""Stage 2: kernels -> `VQArray`, by annealed k-means, layer by layer."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pqf_jax.core import plan as plans
from pqf_jax.core import trees, vq_array
from pqf_jax.ops import kmeans

PyTree = Any


class LayerSummary(NamedTuple):
  """What quantizing one kernel cost.

  Attributes:
    path: of the kernel.
    distortion: mean squared error of a weight over the kernel's variance; 0 is
      lossless, 1 as bad as the mean.
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
  on_layer: Callable[[LayerSummary], None] = lambda summary: None,
) -> tuple[PyTree, dict[str, LayerSummary]]:
  """Learns a codebook and codes for every kernel of the plan.

  Section 3.3 of arXiv 2010.15703 (SR-C). A layer's result depends on the key,
  its path and its weights only, not on the other layers.

  Args:
    key: random number generator key, consumed.
    variables: dense variable tree.
    plan: which kernels, and how.
    annealed: False: plain k-means (Lloyd), to compare with.
    on_layer: called after each layer, for progress.

  Returns:
    (variables with `VQArray`s, {path: LayerSummary}).

  Raises:
    InputError: NaN or infinite weights; all layers are looked at before any
      work.
  """
  flat = trees.flatten(variables)
  for path in plan:
    trees.check_finite(path, flat[path])
  quantizer = kmeans.annealed_kmeans if annealed else kmeans.lloyd_kmeans
  nodes, summaries = {}, {}
  for path, layer in plan.items():
    layer_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
    nodes[path], summaries[path] = _quantize(
      layer_key, path, flat[path], layer, quantizer
    )
    on_layer(summaries[path])
  return trees.replace(variables, nodes), summaries


def _quantize(
  key: jax.Array,
  path: str,
  kernel: jax.Array,
  layer: plans.LayerPlan,
  quantizer: Callable[..., kmeans.KMeansResult],
) -> tuple[vq_array.VQArray, LayerSummary]:
  sub_vectors = layer.spec.to_blocks(kernel)
  c_out, m, block = sub_vectors.shape
  result = quantizer(
    key,
    sub_vectors.reshape(-1, block),
    num_codes=layer.num_codes,
    num_steps=layer.kmeans_steps,
  )
  codes = result.codes.reshape(c_out, m)
  node = vq_array.VQArray(
    result.codebook.astype(kernel.dtype),
    codes.astype(vq_array.code_dtype(layer.num_codes)),
    kernel.shape,
    layer.spec,
  )
  steps = np.asarray(result.distortion)
  # A constant kernel has no variance, and no error either.
  variance = max(float(jnp.var(kernel)), np.finfo(np.float32).tiny)
  return node, LayerSummary(path, float(steps[-1]) / block / variance, steps)

"""Measures how much the outputs of a network change by an error of a kernel."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pqf_jax import errors
from pqf_jax.allocation import distortion
from pqf_jax.core import modules, trees
from pqf_jax.discovery import masks

PyTree = Any

# Relative distortion that is tried: about what k-means leaves of a kernel at 30
# times fewer bytes.
_TRIED = 0.3


def output_changes(
  apply_fn: Callable[..., PyTree],
  variables: PyTree,
  paths: Collection[str],
  batches: Sequence[tuple[PyTree, ...]],
  mask_fn: masks.MaskFn | None = None,
) -> dict[str, float]:
  """Returns {path: change of the outputs where a kernel is half noise}.

  One kernel at a time gets a random error, of its own scale and such that its
  variance stays, as quantizing and then calibrating would give it. The change
  is the square of what the outputs differ, over their variance, summed over
  output arrays. It is scaled by the ratio of noise to signal, see
  `distortion.noise_to_signal`. All stacked layers of a kernel get an error at
  once.

  Args:
    apply_fn: `apply_fn(variables, *inputs)`.
    variables: dense variable tree.
    paths: kernels.
    batches: inputs.
    mask_fn: see `masks.make_mask`; outputs with its first axes, and more behind
      them, count only where it is True.

  Raises:
    InputError: outputs are not finite, as it is or with an error, or no error
      changes them.
  """
  flat = trees.flatten(variables)
  key = jax.random.key(0)

  @jax.jit
  def run(*sealed: PyTree) -> list[jax.Array]:
    returned = modules.call(apply_fn, *sealed)
    leaves = map(jnp.asarray, jax.tree.leaves(returned))
    return [
      leaf.astype(jnp.float32)
      for leaf in leaves
      if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]

  def outputs(
    variables: PyTree, inputs: tuple[PyTree, ...], mask: jax.Array
  ) -> list[jax.Array]:
    leaves = run(modules.seal(variables), modules.seal(inputs))
    return [
      jnp.where(masks.spread_mask(mask, leaf.shape), leaf, 0) for leaf in leaves
    ]

  cases = [(batch, masks.make_mask(mask_fn, batch)) for batch in batches]
  expected = [outputs(variables, *case) for case in cases]
  scales = _variances(expected)
  noise = float(distortion.noise_to_signal(np.array(_TRIED)))
  changes = {}
  for i, path in enumerate(paths):
    disturbed = trees.replace(
      variables, {path: _disturb(jax.random.fold_in(key, i), flat[path])}
    )
    total = 0.0
    for case, wanted in zip(cases, expected, strict=True):
      got = outputs(disturbed, *case)
      total += sum(
        float(jnp.square(a - b).mean()) / scale
        for a, b, scale in zip(got, wanted, scales, strict=True)
      )
    if not np.isfinite(total):
      raise errors.InputError(
        f"the network's outputs on the batches are NaN or infinite when {path} "
        "has an error; give other batches, or none"
      )
    changes[path] = total / len(batches) / noise
  if not any(changes.values()):
    raise errors.InputError(
      "no error of a kernel changes the network's outputs on the batches; let "
      "it return floats, such as logits and not classes, or give other "
      "batches, or none"
    )
  return changes


def _variances(expected: Sequence[Sequence[jax.Array]]) -> list[float]:
  """Returns the variance of each output array over all batches."""
  variances = []
  for parts in zip(*expected, strict=True):
    variance = float(np.concatenate([np.ravel(part) for part in parts]).var())
    if not np.isfinite(variance):
      raise errors.InputError(
        "the network's outputs on the batches are NaN or infinite; check the "
        "samples and the weights"
      )
    variances.append(max(variance, float(np.finfo(np.float32).tiny)))
  return variances


@jax.jit
def _disturb(key: jax.Array, kernel: jax.Array) -> jax.Array:
  noise = kernel.std() * jax.random.normal(key, kernel.shape, kernel.dtype)
  return jnp.sqrt(1 - _TRIED) * kernel + jnp.sqrt(_TRIED) * noise

"""Compression of a trained network in one call."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from pqf_jax import permute, quantize
from pqf_jax.core import plan as plans
from pqf_jax.core import trees, vq_array
from pqf_jax.discovery import discover

PyTree = Any


class Compressed(NamedTuple):
  """Result of `compress`.

  Attributes:
    variables: with `VQArray`s in the place of the compressed kernels.
    plan: which kernels are compressed, and how.
    size: bytes that `pqf_jax.save` will write, without the header.
    groups: what the permutation gained in each channel group.
    layers: {path: what quantizing this kernel lost}.
  """

  variables: PyTree
  plan: plans.CompressionPlan
  size: plans.SizeReport
  groups: tuple[permute.GroupReport, ...]
  layers: dict[str, quantize.LayerSummary]


def compress(
  apply_fn: Callable[..., PyTree],
  variables: PyTree,
  sample: PyTree,
  rules: Sequence[plans.Rule],
  *,
  key: jax.Array,
) -> Compressed:
  """Permutes and quantizes any network; fine-tune the result, then `save` it.

  Args:
    apply_fn: (variables, sample) -> outputs, traceable by JAX.
    variables: dense variable tree.
    sample: one small input; the network is run on it a few times.
    rules: see `plan.Rule`; every kernel must be covered.
    key: random number generator key, consumed.

  Raises:
    InputError: variables or sample are not arrays; see `make_plan`,
      `discover_channels` and `quantize_params`.
  """
  vq_array.check_dense(variables)
  trees.check_arrays("sample", sample)
  plan = plans.make_plan(rules, variables)
  permute_key, quantize_key = jax.random.split(key)
  axes = discover.discover_channels(apply_fn, variables, sample)
  permuted, _, groups = permute.permute_channels(
    permute_key, variables, axes, plan
  )
  compressed, layers = quantize.quantize_params(quantize_key, permuted, plan)
  size = plans.predict_size(plan, compressed)
  return Compressed(compressed, plan, size, groups, layers)

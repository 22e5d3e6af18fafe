"""The one-call form: a trained network in, a compressed one out."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from pqf_jax import permute, quantize
from pqf_jax.core import plan as plans
from pqf_jax.discovery import discover

PyTree = Any


class Compressed(NamedTuple):
  """Result of `compress`.

  Attributes:
    variables: with `VQArray`s in the place of the compressed kernels.
    plan: what was compressed, and how.
    size: bytes that `pqf_jax.save` will write, header apart.
    groups: `permute.GroupReport`s, what the permutation gained.
    layers: {path: quantize.LayerSummary}, what the quantization lost.
  """

  variables: PyTree
  plan: plans.CompressionPlan
  size: plans.SizeReport
  groups: tuple[permute.GroupReport, ...]
  layers: dict[str, quantize.LayerSummary]


def compress(
  apply_fn: Any,
  variables: PyTree,
  sample: Any,
  rules: Sequence[plans.Rule],
  *,
  key: jax.Array,
) -> Compressed:
  """Permutes and quantizes any network; fine-tune the result, then `save` it.

  Args:
    apply_fn: (variables, sample) -> outputs, traceable by JAX.
    variables: dense variable tree.
    sample: one small input; only its shape matters.
    rules: see `plan.Rule`; every kernel must be covered.
    key: random number generator key, consumed.

  Raises:
    InputError: see `make_plan`, `discover_channels` and `quantize_params`.
  """
  plan = plans.make_plan(rules, variables)
  permute_key, quantize_key = jax.random.split(key)
  axes = discover.discover_channels(apply_fn, variables, sample)
  permuted, _, groups = permute.permute_channels(
    permute_key, variables, axes, plan
  )
  compressed, layers = quantize.quantize_params(quantize_key, permuted, plan)
  size = plans.predict_size(plan, compressed)
  return Compressed(compressed, plan, size, groups, layers)

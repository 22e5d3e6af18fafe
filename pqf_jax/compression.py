"""Compression of a trained network in one call."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from pqf_jax import calibrate, permute, quantize
from pqf_jax.core import plan as plans
from pqf_jax.core import trees, vq_array
from pqf_jax.discovery import discover, kernels, readers

PyTree = Any


class Compressed(NamedTuple):
  """Result of `compress`.

  Attributes:
    variables: with `VQArray`s in the place of the compressed kernels.
    plan: which kernels are compressed, and how.
    size: bytes that `pqf_jax.save` will write, without the header.
    groups: what the permutation gained in each channel group.
    layers: {path: what quantizing this kernel lost}.
    outputs: {path: what this layer's outputs lose, before and after the
      calibration}; empty without one.
  """

  variables: PyTree
  plan: plans.CompressionPlan
  size: plans.SizeReport
  groups: tuple[permute.GroupReport, ...]
  layers: dict[str, quantize.LayerSummary]
  outputs: dict[str, calibrate.LayerError]


def compress(
  apply_fn: Callable[..., PyTree],
  variables: PyTree,
  sample: PyTree,
  rules: Sequence[plans.Rule],
  *,
  key: jax.Array,
  calibration: Sequence[PyTree] = (),
) -> Compressed:
  """Permutes, quantizes and calibrates any network; `save` writes the result.

  Args:
    apply_fn: (variables, sample) -> outputs, traceable by JAX.
    variables: dense variable tree.
    sample: one small input; the network is run on it a few times.
    rules: see `plan.Rule`; every kernel (`find_kernels`) must be covered.
    key: random number generator key, consumed.
    calibration: batches of inputs like `sample`, all of one shape; about 1,000
      samples without labels, with which the result follows the dense network:
      see `calibrate_params`. Without any, fine-tune the result.

  Raises:
    InputError: variables or samples are not arrays, or a layer takes no
      compressed kernel; see `make_plan`, `discover_channels`,
      `quantize_params` and `calibrate_params`.
  """
  vq_array.check_dense(variables)
  trees.check_arrays("sample", sample)
  trees.check_arrays("calibration", list(calibration))
  found = kernels.find_kernels(apply_fn, variables, sample)
  plan = plans.make_plan(rules, variables, found)
  readers.check_readers(apply_fn, plan, variables, sample)
  permute_key, quantize_key = jax.random.split(key)
  axes = discover.discover_channels(apply_fn, variables, sample)
  permuted, _, groups = permute.permute_channels(
    permute_key, variables, axes, plan
  )
  compressed, layers = quantize.quantize_params(quantize_key, permuted, plan)
  outputs: dict[str, calibrate.LayerError] = {}
  if calibration:
    compressed, outputs = calibrate.calibrate_params(
      apply_fn, permuted, compressed, [(batch,) for batch in calibration]
    )
  size = plans.predict_size(plan, compressed)
  return Compressed(compressed, plan, size, groups, layers, outputs)

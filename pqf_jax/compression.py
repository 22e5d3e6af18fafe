"""Compression of a trained network in one call."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from pqf_jax import budget, calibrate, errors, permute, quantize
from pqf_jax.core import plan as plans
from pqf_jax.core import trees, vq_array
from pqf_jax.discovery import discover, kernels, masks, readers, samples

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
  variables: PyTree = None,
  sample: PyTree = None,
  rules: Sequence[plans.Rule] | str = "auto",
  *,
  key: jax.Array,
  calibration: Sequence[PyTree] = (),
  target_ratio: float | None = None,
  target_bytes: int | None = None,
  mask_fn: masks.MaskFn | None = None,
) -> Compressed:
  """Permutes, quantizes and calibrates any network; `save` writes the result.

  Args:
    apply_fn: (variables, sample) -> outputs, traceable by JAX: a network in
      inference mode. Or a module that holds its variables, of NNX after
      `eval()` or of Equinox; without `variables`, all else by name.
    variables: dense variables, a tree or module of any library. The result has
      the same type.
    sample: one small input; the network is run on it a few times. Several, and
      arguments by name, as `Inputs`.
    rules: see `plan.Rule`; every kernel (`find_kernels`) must be covered. Or
      'auto', which chooses them for a target: see `allocate_bytes`. The first
      batch of the calibration then tells which kernels matter.
    key: random number generator key, consumed.
    calibration: batches of inputs like `sample`, all of one shape; about 1,000
      samples without labels, with which the result follows the dense network:
      see `calibrate_params`. Without any, fine-tune the result.
    target_ratio: with 'auto', how many times smaller the file is to be; or
    target_bytes: its bytes, without the header.
    mask_fn: where the samples of the calibration are padded,
      `mask_fn(sample)` -> bool, False for padding; see `calibrate_params`.

  Raises:
    InputError: variables or samples are not arrays or are missing, a target
      without 'auto', or a layer takes no compressed kernel; see `make_plan`,
      `allocate_bytes`, `discover_channels`, `quantize_params` and
      `calibrate_params`.
  """
  if variables is None:
    apply_fn, variables = _take_module(apply_fn)
  vq_array.check_dense(variables)
  _check_sample(sample)
  samples.check_list("calibration", calibration)
  batches = [(batch,) for batch in calibration]
  if batches:
    calibrate.check_samples("calibration", apply_fn, variables, batches)
  targeted = target_ratio is not None or target_bytes is not None
  if isinstance(rules, str) and rules == "auto":
    rules = budget.auto_rules(
      apply_fn,
      variables,
      sample,
      target_ratio=target_ratio,
      target_bytes=target_bytes,
      batches=batches[:1],
      mask_fn=mask_fn,
    )
  elif isinstance(rules, str) or targeted:
    raise errors.InputError(
      f"rules is {rules!r}, target_ratio {target_ratio!r} and target_bytes "
      f"{target_bytes!r}; give a list of pqf_jax.Rule and no target, or "
      "rules='auto' and one target"
    )
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
  if batches:
    compressed, outputs = calibrate.calibrate_params(
      apply_fn, permuted, compressed, batches, mask_fn=mask_fn
    )
  size = plans.predict_size(plan, compressed)
  return Compressed(compressed, plan, size, groups, layers, outputs)


def _take_module(module: Any) -> tuple[Callable[..., PyTree], PyTree]:
  """Returns a module's function of itself and its inputs, and the module."""
  leaves = trees.leaves(module)
  # A function is a tree of one leaf, itself.
  if not callable(module) or not leaves or leaves[0] is module:
    raise errors.InputError(
      f"variables is None, and the network is a {type(module).__name__}, which "
      "holds none; give compress(apply_fn, variables, sample), or a module of "
      "NNX or Equinox that can be called"
    )
  return lambda called, *args, **kwargs: called(*args, **kwargs), module


def _check_sample(sample: PyTree) -> None:
  if sample is None or isinstance(sample, str):
    raise errors.InputError(
      f"sample is {sample!r}; give an example of the network's inputs, for a "
      "module that holds its variables by name: compress(module, sample=...)"
    )
  trees.check_arrays("sample", sample)

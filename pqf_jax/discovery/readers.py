"""Checks that the layers of a network can read compressed kernels."""

from typing import Any, NamedTuple

import jax

from pqf_jax import errors
from pqf_jax.core import modules
from pqf_jax.core import plan as plans
from pqf_jax.discovery import tracing

PyTree = Any


class Unreadable(NamedTuple):
  """A kernel that its layer cannot read as a `VQArray`, and why."""

  path: str
  reason: str


def check_readers(
  apply_fn: tracing.ApplyFn,
  plan: plans.CompressionPlan,
  variables: PyTree,
  *inputs: PyTree,
) -> None:
  """Traces the compressed network, of which no weight is known yet.

  Raises:
    InputError: names a kernel that its layer cannot read as a `VQArray`.
  """
  found = find_unreadable(apply_fn, plan, variables, *inputs)
  if found is not None:
    raise errors.InputError(
      f"the network cannot read {found.path} once it is compressed: "
      f"{found.reason} -- functions of jax.lax take arrays only: let the "
      "network read kernel[...], apply it to pqf_jax.decode_params(variables), "
      "or keep the kernel dense by a rule with num_codes=None; where a loop or "
      "vmap takes slices of it, name that axis by Rule(..., "
      "axes=pqf_jax.KernelAxes(inputs, outputs, stacked))"
    )


def find_unreadable(
  apply_fn: tracing.ApplyFn,
  plan: plans.CompressionPlan,
  variables: PyTree,
  *inputs: PyTree,
) -> Unreadable | None:
  """Returns a kernel of the plan that its layer cannot read, or None."""
  reason = _fault(apply_fn, plan, variables, inputs)
  if not reason:
    return None
  suspects = list(plan)
  while len(suspects) > 1:  # one that cannot be read on its own
    half = suspects[: len(suspects) // 2]
    part = {path: plan[path] for path in half}
    fault = _fault(apply_fn, part, variables, inputs)
    suspects = half if fault else suspects[len(half) :]
    reason = fault or reason
  return Unreadable(suspects[0], reason)


def _fault(
  apply_fn: tracing.ApplyFn,
  plan: plans.CompressionPlan,
  variables: PyTree,
  inputs: tuple[PyTree, ...],
) -> str:
  """Returns why the network cannot be traced, or nothing."""
  compressed = plans.compressed_shapes(plan, variables)
  try:
    jax.eval_shape(
      lambda *sealed: modules.call(apply_fn, *sealed),
      modules.seal(compressed),
      modules.seal(inputs),
    )
  except Exception as error:  # whatever the caller's function may raise
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
  return ""

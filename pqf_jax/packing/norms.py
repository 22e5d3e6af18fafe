"""Batch norms as two vectors: scale and bias with the statistics folded in."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pqf_jax import errors
from pqf_jax.core import plan as plans
from pqf_jax.core import storage as storages
from pqf_jax.core import trees
from pqf_jax.packing import header, scaling

# Rounding may shift the outputs of a norm by so much of their size.
_MOST_SHIFT = 0.01


def choose_epsilons(
  norms: Mapping[str, Any], given: float | Mapping[str, float] | None
) -> dict[str, float]:
  """Returns {norm: its epsilon}.

  Raises:
    InputError: norms have none, or a pattern matches no norm.
  """
  if not isinstance(given, Mapping):
    given = {} if given is None else {".*": given}
  for pattern, epsilon in given.items():
    header.check_epsilon(f"norm_epsilon of {pattern!r}", epsilon)
    plans.check_pattern("norm_epsilon", pattern)
  matches = {
    norm: [p for p in given if re.fullmatch(p, norm)] for norm in norms
  }
  without = [norm for norm in norms if not matches[norm]]
  if without:
    raise errors.InputError(
      f"batch norms {', '.join(without[:5])} ({len(without)} of {len(norms)}) "
      "cannot be folded without their epsilon; pass norm_epsilon=EPSILON, or "
      "{pattern of the norm's path: EPSILON}"
    )
  unused = given.keys() - {first for first, *_ in matches.values()}
  if norms and unused:
    raise errors.InputError(
      f"norm_epsilon has patterns that match no norm, or only norms that an "
      f"earlier one matches: {sorted(unused)}; fix or remove them (norms: "
      f"{', '.join(list(norms)[:5])})"
    )
  return {norm: float(given[first]) for norm, (first, *_) in matches.items()}


def fold(
  norm: str,
  leaves: Sequence[trees.Array],
  epsilon: float,
  storage: storages.Storage,
) -> scaling.Scaled:
  """Folds a norm's mean and variance into its scale and bias.

  Args:
    norm: its path, for messages.
    leaves: its scale, bias, mean and variance.
    epsilon: that is added to the variance.
    storage: whether the result is rounded.

  Returns:
    [scale, bias] of a norm with mean 0 and variance 1 - epsilon.

  Raises:
    InputError: a number is not finite, a variance not positive, or float16
      would keep too little.
  """
  for leaf in leaves:
    header.check_numbers(norm, np.asarray(leaf))
  scale, bias, mean, var = (np.asarray(leaf, np.float64) for leaf in leaves)
  if (var + epsilon <= 0).any():
    raise errors.InputError(
      f"{norm} has a variance of {var.min():g}, and epsilon {epsilon:g} does "
      "not make it positive; use weights whose variances are"
    )
  slope = scale / np.sqrt(var + epsilon)
  with np.errstate(over="ignore"):
    folded = np.stack([slope, bias - mean * slope]).astype(np.float32)
  header.check_numbers(f"{norm}, folded into float32,", folded)
  if not storage.rounds(plans.NORM[0].format(norm), folded):
    return scaling.Scaled(folded, 0, folded.dtype)
  halved = scaling.halve(folded)
  # What changes at the mean, against the outputs: these have the deviation
  # `scale` about `bias`.
  slopes, biases = halved.restore().astype(np.float64)
  shift = np.linalg.norm(slopes * mean + biases - bias)
  size = np.linalg.norm([scale, bias])
  if shift > _MOST_SHIFT * size:
    raise errors.InputError(
      f"{norm} has means up to {np.abs(mean).max():g}: folded into float16, "
      f"its outputs would shift by {shift / size:.1%}; pack with "
      "Storage(rest='float32')"
    )
  return halved


def unfold(epsilon: float, folded: scaling.Scaled) -> tuple[np.ndarray, ...]:
  """Returns scale, bias, mean and variance; undoes `fold`."""
  scale, bias = map(np.array, folded.restore())
  return scale, bias, np.zeros_like(scale), np.full_like(scale, 1 - epsilon)

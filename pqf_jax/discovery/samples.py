"""Checks batches of a network's inputs before any work is done with them."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from pqf_jax import errors
from pqf_jax.core import trees
from pqf_jax.discovery import tracing

PyTree = Any


def check_batches(
  name: str,
  apply_fn: tracing.ApplyFn,
  variables: PyTree,
  batches: Sequence[tuple[PyTree, ...]],
  *,
  alike: bool = False,
) -> None:
  """Refuses what `apply_fn(variables, *batch)` cannot be computed of.

  Args:
    name: of the argument, for messages.
    apply_fn: the network.
    variables: what it takes; shapes suffice.
    batches: its inputs.
    alike: whether all must be of one shape.

  Raises:
    InputError: they are no list, such as a generator, of tuples of arrays, are
      empty or differ, have NaN, or the network cannot be traced on the first.
  """
  check_list(name, batches)
  for i, batch in enumerate(batches):
    _check_batch(f"batch {i} of {name}", batch)
  shapes = [str(trees.shapes(batch)) for batch in batches]
  for i, shape in enumerate(shapes if alike else ()):
    if shape != shapes[0]:
      raise errors.InputError(
        f"batch {i} of {name} has other shapes than the first: {shape}, not "
        f"{shapes[0]}; make all batches alike"
      )
  if batches:
    tracing.trace_program(apply_fn, variables, batches[0])


def check_list(name: str, batches: Any) -> None:
  """Refuses what is no list of batches, such as one array, or a generator.

  Raises:
    InputError: names its type.
  """
  if not isinstance(batches, Sequence) or isinstance(batches, str):
    raise errors.InputError(
      f"{name} is of type {type(batches).__name__}; give a list of batches, "
      "since they are read more than once"
    )


def _check_batch(where: str, batch: Any) -> None:
  if not isinstance(batch, tuple):
    raise errors.InputError(
      f"{where} is of type {type(batch).__name__}; give a tuple of the "
      "network's inputs, such as (images,)"
    )
  trees.check_arrays(where, batch)
  arrays = trees.leaves(batch)
  if not any(map(np.size, arrays)):
    raise errors.InputError(f"{where} is empty; give some samples")
  # Infinite numbers may be a mask.
  for array in arrays:
    is_float = jnp.issubdtype(array.dtype, jnp.inexact)
    if is_float and jnp.isnan(array).any():
      raise errors.InputError(f"{where} has NaN; check the samples")

"""A network compiled once, to be run with its channels in other orders."""

import contextlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jax_core

from pqf_jax.core import channels
from pqf_jax.discovery import tracing, widening

PyTree = Any
TOLERANCE = 1e-10
OWN_PRECISION_TOLERANCE = 1e-2


class PermutedNetwork(NamedTuple):
  """A compiled network with the variables to be permuted.

  Attributes:
    run: (*leaves of the variables) -> leaves of the outputs.
    variables: of the precision in which it runs.
    wide: whether this is float64.
  """

  run: Callable[..., list[jax.Array]]
  variables: PyTree
  wide: bool

  @property
  def tolerance(self) -> float:
    """The difference of outputs that counts as rounding, relative."""
    return TOLERANCE if self.wide else OWN_PRECISION_TOLERANCE

  def outputs(
    self, axes: channels.ChannelAxes, permutations: channels.Permutations
  ) -> list[np.ndarray]:
    """The leaves of the outputs after permuting the variables."""
    with _on_cpu(), _precision(self.wide):
      permuted = channels.apply_permutations(self.variables, axes, permutations)
      return jax.device_get(self.run(*jax.tree.leaves(permuted)))


def _precision(wide: bool) -> contextlib.AbstractContextManager[Any]:
  return jax.enable_x64(True) if wide else contextlib.nullcontext()


def compile_network(
  program: tracing.Jaxpr, variables: PyTree, inputs: PyTree
) -> PermutedNetwork:
  """Compiles a program in float64, or with a warning in its own precision.

  Args:
    program: from `tracing.trace_program`.
    variables: arrays of any precision.
    inputs: likewise; they are fixed.
  """
  try:
    return _compile_in(program, variables, inputs, wide=True)
  except Exception as error:  # of any primitive that insists on its own type
    warnings.warn(
      "the network cannot be run in float64, so that the self-check of the "
      f"channel groups misses changes below 1 %: {error}",
      stacklevel=4,
    )
    return _compile_in(program, variables, inputs, wide=False)


def _compile_in(
  program: tracing.Jaxpr, variables: PyTree, inputs: PyTree, *, wide: bool
) -> PermutedNetwork:
  def cast(leaf: Any, aval: Any) -> Any:
    if jnp.issubdtype(aval.dtype, jax.dtypes.extended):  # random keys
      return leaf
    dtype = widening.widen_dtype(aval.dtype) if wide else aval.dtype
    return np.asarray(leaf, dtype)

  leaves, structure = jax.tree.flatten((variables, inputs))
  arrays = list(map(cast, leaves, program.in_avals))
  variables, inputs = structure.unflatten(arrays)
  fixed = jax.tree.leaves(inputs)
  evaluate = widening.run_widened if wide else _run_as_is
  with _on_cpu(), _precision(wide):
    traced = jax.jit(lambda *values: evaluate(program, values)).trace(*arrays)
    # It runs a few times only: compiling with care would take longer.
    options = {"xla_backend_optimization_level": 0}
    compiled = traced.lower().compile(compiler_options=options)
  return PermutedNetwork(
    lambda *leaves: compiled(*leaves, *fixed), variables, wide
  )


def _run_as_is(
  program: tracing.Jaxpr, arguments: Sequence[Any]
) -> list[jax.Array]:
  return jax_core.jaxpr_as_fun(program)(*arguments)


def _on_cpu() -> contextlib.AbstractContextManager[Any]:
  """TPUs have no float64; on GPUs nothing is gained."""
  try:
    return jax.default_device(jax.local_devices(backend="cpu")[0])
  except RuntimeError:  # JAX_PLATFORMS excludes it
    return contextlib.nullcontext()

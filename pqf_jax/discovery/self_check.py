"""The self-check: permutes every group at random and compares the outputs."""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jax_core

from pqf_jax.core import channels, modules, spread, trees
from pqf_jax.discovery import tracing, widening

PyTree = Any
TOLERANCE = 1e-10
OWN_PRECISION_TOLERANCE = 1e-2
JITTER = 0.1


class CompiledNetwork(NamedTuple):
  """A network compiled once, to be run with its channels in other orders.

  Attributes:
    run: (*leaves of the variables) -> leaves of the outputs.
    variables: jittered, in the precision of `run`.
    wide: whether this is float64.
  """

  run: Callable[..., list[jax.Array]]
  variables: PyTree
  wide: bool

  @property
  def tolerance(self) -> float:
    """Returns the relative difference of outputs that counts as rounding."""
    return TOLERANCE if self.wide else OWN_PRECISION_TOLERANCE

  def outputs(
    self, axes: channels.ChannelAxes, permutations: channels.Permutations
  ) -> list[np.ndarray]:
    """Returns the leaves of the outputs after permuting the variables."""
    with _on_cpu(), _precision(self.wide):
      permuted = channels.apply_permutations(self.variables, axes, permutations)
      return jax.device_get(self.run(*trees.leaves(permuted)))


def check_program(
  key: jax.Array,
  program: tracing.Jaxpr,
  variables: PyTree,
  axes: channels.ChannelAxes,
  inputs: tuple[PyTree, ...],
) -> channels.ChannelAxes:
  """Keeps the groups whose permutation leaves the function unchanged.

  All groups are permuted at once, and the outputs compared in float64, to
  1e-10 of the largest; only if they differ is each group tried alone.

  The variables and inputs are jittered before: every entry is scaled by a
  random factor from 0.9 to 1.1, and exact zeros become small positive numbers.
  Otherwise a forgotten norm would not show in a fresh network, whose scales are
  all one and whose biases are all zero. Signs are kept, so that variances stay
  positive. The network is run three times on the inputs, and once more for
  every group if the check fails. The key draws permutations and factors.

  Returns:
    `axes` without the groups that fail. One warning names these; two others
    name a weak check: the network cannot be run in float64 (then 1 % is the
    limit), or even wrong permutations leave the outputs unchanged.

  Raises:
    InputError: `axes` do not fit the variables.
  """
  if not channels.group_sizes(variables, axes):
    return axes
  rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
  network = compile_network(rng, program, variables, inputs)
  return check_groups(rng, network, axes)


def compile_network(
  rng: np.random.Generator,
  program: tracing.Jaxpr,
  variables: PyTree,
  inputs: tuple[PyTree, ...],
) -> CompiledNetwork:
  """Compiles a program in float64, or with a warning in its own precision.

  The variables and inputs are jittered by `rng`; the inputs are fixed.
  """
  sealed = modules.seal(variables), modules.seal(inputs)
  variables, inputs = _jitter(rng, sealed)
  try:
    return _compile_in(program, variables, inputs, wide=True)
  except Exception as error:  # of any primitive that works in one type only
    warnings.warn(
      "the network cannot be run in float64, so that the self-check of the "
      f"channel groups misses changes below 1 %: {error}",
      stacklevel=4,
    )
    return _compile_in(program, variables, inputs, wide=False)


def check_groups(
  rng: np.random.Generator, network: CompiledNetwork, axes: channels.ChannelAxes
) -> channels.ChannelAxes:
  """Does the work of `check_program` on a compiled network.

  `rng` draws the permutations; `axes` have at least one group.
  """
  sizes = channels.group_sizes(network.variables, axes)
  drawn = {group: _draw_permutation(rng, sizes[group]) for group in sizes}
  reference = network.outputs({}, {})

  def changes(axes: channels.ChannelAxes) -> bool:
    groups = channels.group_sizes(network.variables, axes)
    outputs = network.outputs(axes, {group: drawn[group] for group in groups})
    pairs = zip(reference, outputs, strict=True)
    return not all(_agree(*pair, network.tolerance) for pair in pairs)

  def changes_alone(group: str) -> bool:
    return changes(channels.select(axes, lambda axis: axis.group == group))

  if changes(axes):
    # All layers of a stack at once.
    groups = dict.fromkeys(axis.group for _, _, axis in channels.places(axes))
    failed = list(filter(changes_alone, groups)) or list(groups)
    warnings.warn(
      f"permuting the channel groups {failed} changes the outputs of the "
      "network; they are left in their order",
      stacklevel=4,
    )
    return channels.select(axes, lambda axis: axis.group not in failed)
  if not changes(_first_places(axes)):
    warnings.warn(
      "the self-check of the channel groups proves nothing: even wrong "
      "permutations leave the outputs unchanged; pass inputs for which the "
      "outputs are finite and depend on the variables",
      stacklevel=4,
    )
  return axes


def _compile_in(
  program: tracing.Jaxpr, variables: PyTree, inputs: PyTree, *, wide: bool
) -> CompiledNetwork:
  def cast(leaf: Any, aval: Any) -> Any:
    if jnp.issubdtype(aval.dtype, jax.dtypes.extended):  # random keys
      return leaf
    dtype = widening.widen_dtype(aval.dtype) if wide else aval.dtype
    return np.asarray(leaf, dtype)

  leaves, structure = jax.tree.flatten((variables, inputs))
  arrays = list(map(cast, leaves, program.in_avals))
  variables, inputs = jax.tree.unflatten(structure, arrays)
  fixed = jax.tree.leaves(inputs)

  def evaluate(*values: Any) -> list[jax.Array]:
    if wide:
      return widening.run_widened(program, values)
    return jax_core.jaxpr_as_fun(program)(*values)

  with _on_cpu(), _precision(wide):
    traced = jax.jit(evaluate).trace(*arrays)
    # It runs a few times only: compiling with care would take longer.
    options = {"xla_backend_optimization_level": 0}
    compiled = traced.lower().compile(compiler_options=options)
  return CompiledNetwork(
    lambda *leaves: compiled(*leaves, *fixed), variables, wide
  )


def _precision(wide: bool) -> contextlib.AbstractContextManager[Any]:
  return jax.enable_x64(True) if wide else contextlib.nullcontext()


def _on_cpu() -> contextlib.AbstractContextManager[Any]:
  """Chooses the CPU: TPUs have no float64, and on GPUs nothing is gained."""
  try:
    return jax.default_device(jax.local_devices(backend="cpu")[0])
  except RuntimeError:  # JAX_PLATFORMS excludes it
    return contextlib.nullcontext()


def _jitter(rng: np.random.Generator, tree: PyTree) -> PyTree:
  def jitter_leaf(leaf: Any) -> Any:
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
      return leaf
    leaf = spread.to_host(leaf).astype(np.float64)
    num_summed = leaf.size / leaf.shape[-1] if leaf.ndim and leaf.size else 1
    # A layer of zeros only then gives outputs of about 0.1.
    ground = JITTER / np.sqrt(num_summed) * rng.uniform(0.5, 1, leaf.shape)
    factor = rng.uniform(1 - JITTER, 1 + JITTER, leaf.shape)
    return np.where(leaf == 0, ground, leaf * factor)

  return jax.tree.map(jitter_leaf, tree)


def _draw_permutation(rng: np.random.Generator, size: int) -> np.ndarray:
  """Draws a permutation that is not the identity; groups have 2 or more."""
  identity = np.arange(size, dtype=np.int32)
  drawn = identity
  while size > 1 and np.array_equal(drawn, identity):
    drawn = rng.permutation(identity)
  return drawn


def _agree(first: np.ndarray, second: np.ndarray, tolerance: float) -> bool:
  if not jnp.issubdtype(first.dtype, jnp.inexact):
    return np.array_equal(first, second)
  finite = np.isfinite(first)
  if not np.array_equal(finite, np.isfinite(second)):
    return False
  first, second = first[finite], second[finite]
  largest = np.abs(first).max(initial=0)
  return bool(np.abs(first - second).max(initial=0) <= tolerance * largest)


def _first_places(axes: channels.ChannelAxes) -> channels.ChannelAxes:
  """Cuts each group down to one axis, whose permutation changes any network."""
  kept_groups: set[str] = set()

  def keep(axis: channels.ChannelAxis) -> bool:
    new = axis.group not in kept_groups
    kept_groups.add(axis.group)
    return new

  return channels.select(axes, keep)

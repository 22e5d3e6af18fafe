"""The self-check: permute every group at random and compare the outputs."""

import warnings
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pqf_jax.core import channels
from pqf_jax.discovery import permuted_network, tracing

PyTree = Any
JITTER = 0.1


def check_channels(
  key: jax.Array,
  apply_fn: tracing.ApplyFn,
  variables: PyTree,
  axes: channels.ChannelAxes,
  *inputs: PyTree,
) -> channels.ChannelAxes:
  """Keeps the groups whose permutation leaves the function as it is.

  All groups are permuted at once, and the outputs compared in float64, to
  1e-10 of the largest; only if they differ is each group tried alone.

  The variables and inputs used are not the given ones: every entry is scaled
  by a random factor from 0.9 to 1.1, and exact zeros become small positive
  numbers. Otherwise a forgotten norm would not show in a fresh network, whose
  scales are all one and whose biases are all zero. Signs are kept, so that
  variances stay positive.

  Args:
    key: consumed; draws the permutations and the factors.
    apply_fn: as in `discover.discover_channels`.
    variables: arrays; they are not changed.
    axes: from discovery, or written by hand.
    *inputs: a small example; the network is run three times on it, and once
      more for every group if the check fails.

  Returns:
    `axes` without the groups that fail. A warning names these. Others tell if
    the check was weak: because the network cannot be run in float64 (then 1 %
    is the limit), or because even wrong permutations leave the outputs as they
    are.

  Raises:
    InputError: the apply function cannot be traced; or `axes` do not fit the
      variables.
  """
  program = tracing.trace_program(apply_fn, variables, inputs)
  return check_program(key, program, variables, axes, inputs)


def check_program(
  key: jax.Array,
  program: tracing.Jaxpr,
  variables: PyTree,
  axes: channels.ChannelAxes,
  inputs: tuple[PyTree, ...],
) -> channels.ChannelAxes:
  """`check_channels` for a program that has been traced already."""
  sizes = channels.group_sizes(variables, axes)
  if not sizes:
    return axes
  rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
  variables, inputs = _jitter(rng, (variables, inputs))
  drawn = {group: _draw_permutation(rng, sizes[group]) for group in sizes}
  network = permuted_network.compile_network(program, variables, inputs)
  reference = network.outputs({}, {})

  def changes(axes: channels.ChannelAxes, groups: Iterable[str]) -> bool:
    outputs = network.outputs(axes, {group: drawn[group] for group in groups})
    return not _agree(reference, outputs, network.tolerance)

  if changes(axes, sizes):
    failed = [group for group in sizes if changes(axes, [group])]
    return _without(axes, failed or list(sizes))
  if not changes(_first_places(axes), sizes):
    warnings.warn(
      "the self-check of the channel groups saw nothing: even wrong "
      "permutations leave the outputs as they are; pass inputs for which "
      "the outputs are finite and depend on the variables",
      stacklevel=3,
    )
  return axes


def _jitter(rng: np.random.Generator, tree: PyTree) -> PyTree:
  def jitter_leaf(leaf: Any) -> Any:
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
      return leaf
    leaf = np.asarray(leaf, np.float64)
    num_summed = leaf.size / leaf.shape[-1] if leaf.ndim and leaf.size else 1
    # A layer of nothing but zeros gives outputs of about 0.1 then.
    ground = JITTER / np.sqrt(num_summed) * rng.uniform(0.5, 1, leaf.shape)
    factor = rng.uniform(1 - JITTER, 1 + JITTER, leaf.shape)
    return np.where(leaf == 0, ground, leaf * factor)

  return jax.tree.map(jitter_leaf, tree)


def _draw_permutation(rng: np.random.Generator, size: int) -> np.ndarray:
  """A permutation that is not the identity; no group has less than 2."""
  identity = np.arange(size, dtype=np.int32)
  drawn = identity
  while size > 1 and np.array_equal(drawn, identity):
    drawn = rng.permutation(identity)
  return drawn


def _agree(
  first: list[np.ndarray], second: list[np.ndarray], tolerance: float
) -> bool:
  return all(
    _leaves_agree(*pair, tolerance) for pair in zip(first, second, strict=True)
  )


def _leaves_agree(first: Any, second: Any, tolerance: float) -> bool:
  if not jnp.issubdtype(first.dtype, jnp.inexact):
    return np.array_equal(first, second)
  finite = np.isfinite(first)
  if not np.array_equal(finite, np.isfinite(second)):
    return False
  first, second = first[finite], second[finite]
  largest = np.abs(first).max(initial=0)
  return bool(np.abs(first - second).max(initial=0) <= tolerance * largest)


def _first_places(axes: channels.ChannelAxes) -> channels.ChannelAxes:
  """Each group cut down to one axis: permuting this changes any network."""
  seen = set()

  def keep(axis: channels.ChannelAxis | None) -> channels.ChannelAxis | None:
    if axis is None or axis.group in seen:
      return None
    seen.add(axis.group)
    return axis

  return {path: tuple(map(keep, row)) for path, row in axes.items()}


def _without(
  axes: channels.ChannelAxes, failed: list[str]
) -> channels.ChannelAxes:
  warnings.warn(
    f"permuting the channel groups {failed} changes the outputs of the "
    "network; they are left alone",
    stacklevel=4,
  )
  rows = {
    path: tuple(
      None if axis is None or axis.group in failed else axis for axis in row
    )
    for path, row in axes.items()
  }
  return {path: row for path, row in rows.items() if any(row)}

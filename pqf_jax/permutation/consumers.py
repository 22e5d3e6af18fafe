"""The compressed kernels that read a channel group, as its channels."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pqf_jax.core import blocks, channels, trees
from pqf_jax.core import plan as plans

PyTree = Any


class Reader(NamedTuple):
  """A compressed kernel that reads a group, as its channels.

  Attributes:
    path: of the kernel.
    weights: [rows, C, taps] float32; a channel's taps include entries that
      move with it.
    slots: channels that share a sub-vector.
    num_codes: K.
  """

  path: str
  weights: np.ndarray
  slots: int
  num_codes: int


def find_readers(
  variables: PyTree, axes: channels.ChannelAxes, plan: plans.CompressionPlan
) -> dict[str, tuple[list[Reader], list[str]]]:
  """The kernels that an order of each group can help.

  Args:
    variables: dense variable tree.
    axes: which axes are tied.
    plan: which kernels are compressed, and how.

  Returns:
    {group: (its readers, why an order helps none of its other kernels)} for the
    groups that any compressed kernel reads.

  Raises:
    InputError: NaN or infinite weights.
  """
  paths_of = _paths_by_group(axes, plan)
  entries = _channel_entries(variables, paths_of, plan)
  return {
    group: _usable(paths, entries, axes, plan)
    for group, paths in paths_of.items()
  }


def _paths_by_group(
  axes: channels.ChannelAxes, plan: plans.CompressionPlan
) -> dict[str, list[str]]:
  """{group: paths of the compressed kernels whose sub-vectors it orders}."""
  paths_of: dict[str, list[str]] = {}
  for path, row in axes.items():
    axis = row[plan[path].spec.in_axis] if path in plan else None
    if axis is not None:
      paths_of.setdefault(axis.group, []).append(path)
  return paths_of


def _channel_entries(
  variables: PyTree,
  paths_of: Mapping[str, list[str]],
  plan: plans.CompressionPlan,
) -> dict[str, np.ndarray]:
  """{path: [C_out, C_in, taps]} of the kernels that read any group."""
  flat = trees.flatten(variables)
  paths = [path for paths in paths_of.values() for path in paths]
  for path in paths:
    trees.check_finite(path, flat[path])
  specs = tuple(plan[path].spec for path in paths)
  entries = _by_channel([flat[path] for path in paths], specs)
  return dict(zip(paths, jax.device_get(entries), strict=True))


@functools.partial(jax.jit, static_argnames="specs")
def _by_channel(
  kernels: Sequence[jax.Array], specs: tuple[blocks.BlockSpec, ...]
) -> list[jax.Array]:
  """Each as [C_out, C_in, taps] float32; compiled once, not once a call."""
  return [
    spec.to_channels(kernel).astype(jnp.float32)
    for kernel, spec in zip(kernels, specs, strict=True)
  ]


def _usable(
  paths: Sequence[str],
  entries: Mapping[str, np.ndarray],
  axes: channels.ChannelAxes,
  plan: plans.CompressionPlan,
) -> tuple[list[Reader], list[str]]:
  """The kernels that an order of the group can help, and why not the others."""
  readers, notes = [], []
  for path in paths:
    layer = plan[path]
    axis = axes[path][layer.spec.in_axis]
    c_out, c_in, _ = entries[path].shape
    size = c_in // (axis.outer * axis.inner)
    slots, rest = divmod(layer.spec.channels, axis.inner)
    if axis.inner % layer.spec.channels == 0:
      notes.append(f"{path} has one channel in a sub-vector: no order helps it")
    elif rest or size % slots:
      notes.append(
        f"{path} has sub-vectors of {layer.spec.channels} entries, which cut "
        f"its {size} channels of {axis.inner} entries: not looked at"
      )
    elif not entries[path].any():
      notes.append(f"{path} is all zeros: no order helps it")
    else:
      weights = entries[path].reshape(c_out * axis.outer, size, -1)
      readers.append(Reader(path, weights, slots, layer.num_codes))
  return readers, notes

"""Consumers: the compressed kernels that read a channel group."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pqf_jax.core import blocks, channels, trees
from pqf_jax.core import plan as plans

PyTree = Any


class Consumer(NamedTuple):
  """A compressed kernel that reads a group, with its channels as an axis.

  Attributes:
    path: of the kernel.
    weights: [rows, C, taps] float32; a channel's taps include all entries that
      move with it.
    slots: channels that share a sub-vector.
    num_codes: K.
  """

  path: str
  weights: np.ndarray
  slots: int
  num_codes: int


def find_consumers(
  variables: PyTree, axes: channels.ChannelAxes, plan: plans.CompressionPlan
) -> dict[str, tuple[list[Consumer], list[str]]]:
  """Finds the kernels that a new order of each group can help.

  Args:
    variables: dense variable tree.
    axes: which axes are tied.
    plan: which kernels are compressed, and how.

  Returns:
    {group: (its consumers, notes on why no order helps its other kernels)} for
    the groups that any compressed kernel reads.

  Raises:
    InputError: NaN or infinite weights.
  """
  axis_of = {
    path: axis
    for path, row in axes.items()
    if path in plan and (axis := row[plan[path].spec.in_axis]) is not None
  }
  weights = _channel_weights(variables, list(axis_of), plan)
  consumers: dict[str, tuple[list[Consumer], list[str]]] = {}
  for path, axis in axis_of.items():
    usable, notes = consumers.setdefault(axis.group, ([], []))
    note = _why_no_order_helps(path, weights[path], axis, plan[path])
    if note:
      notes.append(note)
    else:
      usable.append(_consumer(path, weights[path], axis, plan[path]))
  return consumers


def _channel_weights(
  variables: PyTree, paths: Sequence[str], plan: plans.CompressionPlan
) -> dict[str, np.ndarray]:
  """Returns {path: [C_out, C_in, taps]} of these kernels."""
  flat = trees.flatten(variables)
  for path in paths:
    trees.check_finite(path, flat[path])
  specs = tuple(plan[path].spec for path in paths)
  weights = _to_channels([flat[path] for path in paths], specs)
  return dict(zip(paths, jax.device_get(weights), strict=True))


@functools.partial(jax.jit, static_argnames="specs")
def _to_channels(
  kernels: Sequence[jax.Array], specs: tuple[blocks.BlockSpec, ...]
) -> list[jax.Array]:
  """Returns each as [C_out, C_in, taps] float32; compiled once for all."""
  return [
    spec.to_channels(kernel).astype(jnp.float32)
    for kernel, spec in zip(kernels, specs, strict=True)
  ]


def _why_no_order_helps(
  path: str,
  weights: np.ndarray,
  axis: channels.ChannelAxis,
  layer: plans.LayerPlan,
) -> str:
  """Returns the reason, or '' where an order of the group may help."""
  size = weights.shape[1] // (axis.outer * axis.inner)
  slots, rest = divmod(layer.spec.channels, axis.inner)
  if axis.inner % layer.spec.channels == 0:
    return f"{path} has one channel in a sub-vector: no order helps it"
  if rest or size % slots:
    return (
      f"{path} has sub-vectors of {layer.spec.channels} entries, which cut "
      f"its {size} channels of {axis.inner} entries: not considered"
    )
  if not weights.any():
    return f"{path} is all zeros: no order helps it"
  return ""


def _consumer(
  path: str,
  weights: np.ndarray,
  axis: channels.ChannelAxis,
  layer: plans.LayerPlan,
) -> Consumer:
  c_out, _, taps = weights.shape
  by_channel = weights.reshape(c_out * axis.outer, -1, axis.inner * taps)
  slots = layer.spec.channels // axis.inner
  return Consumer(path, by_channel, slots, layer.num_codes)

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
  flat = trees.flatten(variables)
  for path in axis_of:
    trees.check_finite(path, flat[path])
  specs = tuple(plan[path].spec for path in axis_of)
  kernels = _to_channels([flat[path] for path in axis_of], specs)
  consumers: dict[str, tuple[list[Consumer], list[str]]] = {}
  for path, weights in zip(axis_of, jax.device_get(kernels), strict=True):
    axis, layer = axis_of[path], plan[path]
    usable, notes = consumers.setdefault(axis.group, ([], []))
    note = _why_no_order_helps(path, weights, axis, layer.spec.channels)
    if note:
      notes.append(note)
      continue
    c_out, _, taps = weights.shape
    by_channel = weights.reshape(c_out * axis.outer, -1, axis.inner * taps)
    slots = layer.spec.channels // axis.inner
    usable.append(Consumer(path, by_channel, slots, layer.num_codes))
  return consumers


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
  path: str, weights: np.ndarray, axis: channels.ChannelAxis, entries: int
) -> str:
  """Returns the reason, or '' where an order of the group may help."""
  size = weights.shape[1] // (axis.outer * axis.inner)
  slots, rest = divmod(entries, axis.inner)
  if axis.inner % entries == 0:
    return f"{path} has one channel in a sub-vector: no order helps it"
  if rest or size % slots:
    return (
      f"{path} has sub-vectors of {entries} entries, which cut its {size} "
      f"channels of {axis.inner} entries: not considered"
    )
  if not weights.any():
    return f"{path} is all zeros: no order helps it"
  return ""

"""Consumers: the compressed kernels that read a channel group."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from pqf_jax.core import blocks, channels, spread, trees
from pqf_jax.core import plan as plans

PyTree = Any


class Consumer(NamedTuple):
  """A compressed kernel that reads a group, with its channels as an axis.

  Attributes:
    path: of the kernel.
    shape: (rows, C, taps) of the weights; a channel's taps include all entries
      that move with it.
    slots: channels that share a sub-vector.
    num_codes: K.
    read: () -> the weights.
  """

  path: str
  shape: tuple[int, ...]
  slots: int
  num_codes: int
  read: Callable[[], np.ndarray]

  @property
  def weights(self) -> np.ndarray:
    """Returns [rows, C, taps] float32, which are not kept here."""
    return self.read()


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
  flat = trees.flatten(variables)
  reads = list(_reads(axes, plan, flat))
  for path in dict.fromkeys(path for path, _ in reads):
    trees.check_finite(path, flat[path])
  consumers: dict[str, tuple[list[Consumer], list[str]]] = {}
  for path, segments in reads:
    kernel, layer = flat[path], plan[path]
    slots = layer.spec.channels // segments[0].inner
    for group, number in _layers(segments[0], layer.spec, kernel.shape):
      usable, notes = consumers.setdefault(group, ([], []))
      read = functools.partial(_read, kernel, layer.spec, number)
      weights = read()
      reasons = (
        _why_no_order_helps(path, weights, axis, layer.spec)
        for axis in segments
      )
      note = next(filter(None, reasons), "")
      if not note:
        shape = _by_channel(weights, segments).shape
        by_channel = functools.partial(_read_by_channel, read, segments)
        usable.append(Consumer(path, shape, slots, layer.num_codes, by_channel))
      elif note not in notes:
        notes.append(note)
  return consumers


def _layers(
  axis: channels.ChannelAxis, spec: blocks.BlockSpec, shape: tuple[int, ...]
) -> Iterator[tuple[str, int]]:
  """Yields (group, number of a layer that it orders) of a whole kernel."""
  layers = list(np.ndindex(*spec.stack_shape(shape)))
  for index, group in axis.groups(shape):
    at = dict(zip(axis.stacked, index, strict=True))
    for number, layer in enumerate(layers):
      place = zip(spec.stack_axes, layer, strict=True)
      if all(at.get(dim, step) == step for dim, step in place):
        yield group, number


def _reads(
  axes: channels.ChannelAxes,
  plan: plans.CompressionPlan,
  flat: Mapping[str, trees.Array],
) -> Iterator[tuple[str, list[channels.ChannelAxis]]]:
  """Yields the segments of each group along a compressed kernel's inputs."""
  for path, row in axes.items():
    if path not in plan:
      continue
    whole = plan[path].spec.whole_axes(plan[path].spec.in_axes, len(row))
    sizes = [flat[path].shape[dim] for dim in whole]
    for place, dim in enumerate(whole):
      before, after = math.prod(sizes[:place]), math.prod(sizes[place + 1 :])
      alike: dict[Any, list[channels.ChannelAxis]] = {}
      for axis in channels.segments(row[dim]):
        found = axis.flattened(before, sizes[place], after)
        alike.setdefault((axis.group, axis.inner), []).extend(found)
      for segments in alike.values():
        yield path, segments


def _read(
  kernel: trees.Array, spec: blocks.BlockSpec, index: int
) -> np.ndarray:
  """Returns one layer as [C_out, C_in, taps] float32.

  Of a kernel that is spread over devices no more than it comes to the host.
  """
  source = kernel if spread.is_spread(kernel) else np.asarray(kernel)
  layer = spread.to_host(spec.take_layer(source, index))
  return np.asarray(spec.to_channels(layer), np.float32)


def _read_by_channel(
  read: Callable[[], np.ndarray], segments: list[channels.ChannelAxis]
) -> np.ndarray:
  return _by_channel(read(), segments)


def _by_channel(
  weights: np.ndarray, segments: list[channels.ChannelAxis]
) -> np.ndarray:
  """Returns segments of [C_out, C_in, taps] as [rows, C, taps of a channel]."""
  c_out, _, taps = weights.shape
  parts = [
    weights[:, axis.start : axis.stop].reshape(
      c_out * axis.outer, -1, axis.inner * taps
    )
    for axis in segments
  ]
  return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _why_no_order_helps(
  path: str,
  weights: np.ndarray,
  axis: channels.ChannelAxis,
  spec: blocks.BlockSpec,
) -> str:
  """Returns the reason, or '' where an order of the group may help."""
  entries = spec.channels
  size = axis.length(weights.shape[1]) // (axis.outer * axis.inner)
  slots, rest = divmod(entries, axis.inner)
  if not {*axis.stacked} <= {*spec.stack_axes}:
    return (
      f"{path} has sub-vectors that reach over layers, each of which has an "
      "order of its own: not considered"
    )
  if axis.start % entries:
    return (
      f"{path} has sub-vectors of {entries} entries, which reach over the "
      f"start of its inputs {axis.start}:{axis.stop}: not considered"
    )
  if axis.inner % entries == 0:
    return f"{path} has one channel in a sub-vector: no order helps it"
  if rest or size % slots:
    return (
      f"{path} has sub-vectors of {entries} entries, which cut its {size} "
      f"channels of {axis.inner} entries: not considered"
    )
  if not weights[:, axis.start : axis.stop].any():
    return f"{path} is all zeros: no order helps it"
  return ""

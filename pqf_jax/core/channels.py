"""Tied axes of the variables, and permuting them together.

Two axes are tied when reordering one without the other would change the
function: the output channels of a layer, its norm, and the input channels of
every layer that reads it (section 3.1 of arXiv 2010.15703).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from pqf_jax import errors
from pqf_jax.core import trees

PyTree = Any


class ChannelAxis(NamedTuple):
  """One array axis that carries the channels of a group.

  The axis is [outer, n, inner] flattened, and only n is permuted: flattening
  NHWC features before a dense layer gives outer = H * W, inner = 1.

  Attributes:
    group: name; axes of one group share one permutation.
    outer: how many times the channels repeat.
    inner: how many consecutive entries belong to one channel.
  """

  group: str
  outer: int = 1
  inner: int = 1


ChannelAxes = Mapping[str, tuple[ChannelAxis | None, ...]]
"""{path: one `ChannelAxis` or None for each array axis}; a path that is absent
is not permuted."""

Permutations = Mapping[str, np.ndarray]
"""{group: int32 [n]}: new channel i is old channel `permutation[i]`."""


def group_sizes(variables: PyTree, axes: ChannelAxes) -> dict[str, int]:
  """Returns {group: number of channels}, checked over all axes of the group.

  Raises:
    InputError: `axes` names a path that the tree lacks, or gives a variable
      another number of axes than it has, or the axes of one group disagree
      about its size.
  """
  flat = trees.flatten(variables)
  unknown = axes.keys() - flat.keys()
  if unknown:
    raise errors.InputError(
      f"channel axes name variables that the tree lacks: {sorted(unknown)}; "
      "remove them, or discover the axes on this tree"
    )
  sizes: dict[str, int] = {}
  for path, row in axes.items():
    shape = flat[path].shape
    if len(row) != len(shape):
      raise errors.InputError(
        f"{path} has shape {shape} but {len(row)} channel axes; give one "
        "entry (None where nothing is permuted) for each array axis"
      )
    for dim, (axis, length) in enumerate(zip(row, shape, strict=True)):
      if axis is None:
        continue
      size, rest = divmod(length, axis.outer * axis.inner)
      expected = sizes.setdefault(axis.group, size)
      if rest or size != expected:
        raise errors.InputError(
          f"{path}: axis {dim} has length {length}, but group {axis.group!r} "
          f"of {expected} channels needs outer * channels * inner = "
          f"{axis.outer} * {expected} * {axis.inner}; correct the axis or its "
          "group"
        )
  return sizes


def apply_permutations(
  variables: PyTree, axes: ChannelAxes, permutations: Permutations
) -> PyTree:
  """Reorders the channels of every group; exact, without arithmetic.

  Groups without a permutation keep their order. If `axes` are the tied axes of
  a network (`discover_channels`), the new variables give the same function.

  Raises:
    InputError: see `group_sizes`; or an array is not a permutation of its
      group's channels.
  """
  sizes = group_sizes(variables, axes)
  for group, permutation in permutations.items():
    expected = np.arange(sizes.get(group, 0))
    if not np.array_equal(np.sort(permutation), expected):
      raise errors.InputError(
        f"group {group!r} needs a permutation of {expected.size} channels, "
        f"got {len(permutation)} entries that are no permutation of "
        f"range({expected.size})"
      )
  flat = trees.flatten(variables)
  changed = {}
  for path, row in axes.items():
    leaf = flat[path]
    for dim, axis in enumerate(row):
      if axis is not None and axis.group in permutations:
        leaf = _take(leaf, dim, axis, permutations[axis.group])
    changed[path] = leaf
  return trees.replace(variables, changed)


def _take(
  leaf: trees.Array, dim: int, axis: ChannelAxis, permutation: np.ndarray
) -> trees.Array:
  shape = leaf.shape
  split = (axis.outer, len(permutation), axis.inner)
  parts = leaf.reshape(shape[:dim] + split + shape[dim + 1 :])
  # The method, so that NumPy leaves stay NumPy and nothing is compiled.
  return parts.take(permutation, axis=dim + 1).reshape(shape)

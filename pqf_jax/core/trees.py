"""Variable trees as flat mappings from a path such as `params/conv1/kernel`."""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jax import tree_util

from pqf_jax import errors
from pqf_jax.core import modules, spread

PyTree = Any
FlatTree = dict[str, Any]
Array = spread.Array
"""A leaf on a device, or on the host."""


def path_name(key_path: tuple[Any, ...]) -> str:
  """Joins a JAX key path by '/': ('params', 'fc', 0) -> 'params/fc/0'."""
  return tree_util.keystr(key_path, simple=True, separator="/")


def flatten(
  tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> FlatTree:
  """Lists the leaves of a tree as {path: leaf}, in the tree's own order.

  Args:
    tree: any pytree, or an NNX module (see `modules.seal`).
    is_leaf: whether a node, such as a `VQArray`, counts as one leaf.

  Raises:
    InputError: two leaves have the same path, so that names are ambiguous.
  """
  sealed = modules.seal(tree)
  named, _ = tree_util.tree_flatten_with_path(sealed, is_leaf=is_leaf)
  flat = {path_name(key_path): leaf for key_path, leaf in named}
  if len(flat) != len(named):
    raise errors.InputError(
      f"the tree has {len(named)} leaves but only {len(flat)} different "
      "paths; rename the keys that contain '/' or are equal as text"
    )
  return flat


def leaves(tree: PyTree) -> list[Any]:
  """Returns the arrays of a tree, in the order of `flatten`."""
  return jax.tree.leaves(modules.seal(tree))


def map_leaves(
  function: Callable[[Any], Any],
  tree: PyTree,
  is_leaf: Callable[[Any], bool] | None = None,
) -> PyTree:
  """Replaces every array of a tree, or node that counts as one leaf."""
  sealed = modules.seal(tree)
  mapped = jax.tree.map(function, sealed, is_leaf=is_leaf)
  return mapped if sealed is tree else modules.unseal(mapped)


def sample_paths(tree: PyTree, count: int = 5) -> str:
  """Returns the first paths of a tree, for messages."""
  paths = list(flatten(tree))
  more = f" and {len(paths) - count} more" if len(paths) > count else ""
  return ", ".join(paths[:count]) + more


def nest(flat: Mapping[str, Any]) -> PyTree:
  """Builds nested dicts from '/'-joined paths; undoes `flatten` of dicts."""
  tree: dict[str, Any] = {}
  for path, leaf in flat.items():
    *parents, name = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return tree


def replace(tree: PyTree, leaves: Mapping[str, Any]) -> PyTree:
  """Copies a tree with other leaves, {path: leaf or node}.

  Raises:
    InputError: a path is not in the tree.
  """
  unknown = leaves.keys() - flatten(tree).keys()
  if unknown:
    raise errors.InputError(
      f"the tree has no leaves {sorted(unknown)}; use paths as "
      "pqf_jax.core.trees.flatten lists them"
    )
  sealed = modules.seal(tree)
  replaced = tree_util.tree_map_with_path(
    lambda key_path, leaf: leaves.get(path_name(key_path), leaf), sealed
  )
  return replaced if sealed is tree else modules.unseal(replaced)


def shapes(tree: PyTree) -> PyTree:
  """Replaces every array by its `jax.ShapeDtypeStruct`; modules are sealed."""
  return map_leaves(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
    modules.seal(tree),
  )


def is_random_key(leaf: Any) -> bool:
  """Returns whether a leaf is a key of `jax.random.key`."""
  dtype = getattr(leaf, "dtype", None)
  return dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def check_arrays(name: str, tree: PyTree) -> None:
  """Refuses shapes and other leaves that have no values.

  Raises:
    InputError: names the leaf and its type.
  """
  for path, leaf in flatten(tree).items():
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
      where = f"{name}, leaf {path!r}," if path else name
      raise errors.InputError(
        f"{where} is of type {type(leaf).__name__}; give arrays with values"
      )


def check_finite(path: str, kernel: Array) -> None:
  """Refuses NaN and infinite weights.

  Raises:
    InputError: names the variable and how many of its entries are bad.
  """
  if not spread.reduce(_are_finite, kernel):
    bad = int(spread.reduce(_count_bad, kernel))
    raise errors.InputError(
      f"{path} has {bad} NaN or infinite weights of {np.size(kernel)}; the "
      "file is damaged or its training diverged: use an earlier checkpoint"
    )


def _are_finite(numpy: ModuleType, kernel: Array) -> Any:
  return numpy.isfinite(kernel).all()


def _count_bad(numpy: ModuleType, kernel: Array) -> Any:
  return (~numpy.isfinite(kernel)).sum()

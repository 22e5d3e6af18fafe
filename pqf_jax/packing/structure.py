"""Trees as leaves and names, and back: the same containers, the same keys.

A leaf's path joins the keys from the root by '/', as `core.trees` does. Here
'~' within a key is written '~0', '/' as '~1' and the empty key as '~2', so that
every path has one meaning; and '__metadata__', a name that safetensors files
have for themselves, as '~3'. Dicts with text as keys are understood; every
other container is listed by path and kind. Of the kind 'node' are those that a
file cannot make, such as modules: only a template gives them back.
"""

import contextlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax import tree_util

from pqf_jax import errors
from pqf_jax.core import modules
from pqf_jax.core import trees as core_trees
from pqf_jax.packing import container

PyTree = Any
# What a node may be besides a dict with text as keys.
KINDS = ("dict", "integers", "list", "node", "none", "tuple")
# Deeper trees are no networks, and JAX itself goes through them by recursion.
MAX_DEPTH = 100
# Without the halves of characters that no text can hold.
_KEY = re.compile(r"(?:[^~/\ud800-\udfff]|~[01])+|~[23]")
# Whole keys that are written in another way.
_WRITTEN = {"": "~2", container.METADATA: "~3"}
_MEANT = {text: key for key, text in _WRITTEN.items()}
# Of 18 digits at most, so that a file cannot ask for more.
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")


def take_apart(
  tree: PyTree, is_leaf: Callable[[Any], bool]
) -> tuple[dict[str, Any], dict[str, str]]:
  """Lists the leaves of a tree and its containers.

  Args:
    tree: nodes and arrays. An NNX module is the dict of its variables; of it,
      and of other modules, what is no array and random keys are left out.
    is_leaf: whether a node counts as a leaf, besides arrays.

  Returns:
    ({path: leaf}, {path: kind of every node that is not a filled dict of text
    keys}); see `KINDS`.

  Raises:
    InputError: a leaf that is no array, named by its path; a key that is
      neither text nor an integer; or more than `MAX_DEPTH` levels.
  """
  leaves: dict[str, Any] = {}
  nodes: dict[str, str] = {}

  def visit(keys: tuple[str, ...], node: Any, in_module: bool = False) -> None:
    path = "/".join(keys)
    if len(keys) > MAX_DEPTH:
      raise errors.InputError(
        f"{path[:40]}... is more than {MAX_DEPTH} levels deep; give a flatter "
        "tree"
      )
    if isinstance(node, modules.Graph):
      node, in_module = node.values, True
    if in_module and _is_made_by_code(node):
      return
    if isinstance(node, modules.Constant):
      node = node.value
    # What a mask hides would come back as numbers.
    masked = isinstance(node, np.ma.MaskedArray)
    arrays = jax.Array | np.ndarray | np.generic
    if is_leaf(node) or (isinstance(node, arrays) and not masked):
      leaves[path] = node
      return
    kind, children = _open(path, node)
    if kind:
      nodes[path] = kind
    for key, child in children.items():
      visit((*keys, _escape(path, key)), child, in_module or kind == "node")

  # Keys that JAX cannot sort are named by the visit.
  with contextlib.suppress(ValueError):
    tree = modules.seal(tree)
  visit((), tree)
  return leaves, nodes


def put_together(leaves: Mapping[str, Any], nodes: Mapping[str, str]) -> PyTree:
  """Builds the tree that `take_apart` took apart.

  Raises:
    InputError: a path is not such as `take_apart` makes them, lies within a
      leaf, or comes twice; or a container cannot have its children.
  """
  top: dict[str, Any] = {}
  for path in nodes:
    _branch(top, path, _keys(path))
  for path, leaf in leaves.items():
    *parents, name = _keys(path)
    branch = _branch(top, path, parents)
    if name in branch:
      raise errors.InputError(f"{path!r} is the path of two variables")
    branch[name] = leaf
  # The innermost first, so that those around them are still dicts.
  for path in sorted(nodes, key=lambda path: len(_keys(path)), reverse=True):
    *parents, name = _keys(path)
    branch = _branch(top, path, parents)
    branch[name] = _close(path, nodes[path], branch[name])
  return top.get("", {})


def path_of(keys: list[str]) -> str:
  """Returns the path of keys that are all text."""
  return "/".join(_escape("", key) for key in keys)


def path_of_leaf(key_path: tuple[Any, ...]) -> str:
  """Returns the path of a leaf of a tree that JAX has flattened."""
  return path_of([core_trees.path_name((key,)) for key in key_path])


def name(path: str) -> str:
  """Returns a path as `core.trees` writes it, which may have many meanings."""
  return "/".join(_keys(path)[1:])


def _open(path: str, node: Any) -> tuple[str | None, dict[Any, Any]]:
  """Returns a container's kind, None for the plain one, and its children."""
  if node is None:
    return "none", {}
  if type(node) in (list, tuple):
    return type(node).__name__, dict(enumerate(node))
  if type(node) is dict:
    kinds = {type(key) for key in node}
    if kinds <= {str}:
      return (None if node else "dict"), node
    if kinds == {int} and all(_INTEGER.fullmatch(str(key)) for key in node):
      return "integers", node
    raise errors.InputError(
      f"{path or 'the tree'} has keys of the types "
      f"{sorted(kind.__name__ for kind in kinds)}; a packed file holds dicts "
      "whose keys are all text, or all integers of up to 18 digits: rename "
      "them"
    )
  parts, _ = tree_util.tree_flatten_with_path(
    node, is_leaf=lambda other: other is not node
  )
  children = {core_trees.path_name(keys): child for keys, child in parts}
  is_leaf = len(parts) == 1 and parts[0][1] is node
  if is_leaf or len(children) < len(parts):
    raise errors.InputError(
      f"{path or 'the tree'} is of type {type(node).__name__}, which a packed "
      "file cannot hold; give arrays, and nodes whose children have names"
    )
  return "node", children


def _is_made_by_code(leaf: Any) -> bool:
  """Returns whether a module makes a leaf itself, so that no file holds it."""
  return isinstance(leaf, modules.Constant) or (
    isinstance(leaf, jax.Array) and core_trees.is_random_key(leaf)
  )


def _close(path: str, kind: str, children: Any) -> Any:
  """Returns the container of a kind; undoes `_open`."""
  names = set(children) if isinstance(children, dict) else None
  if kind in ("list", "tuple") and names is not None:
    order = [str(i) for i in range(len(names))]
    if names == set(order):
      items = [children[name] for name in order]
      return items if kind == "list" else tuple(items)
  if kind == "integers" and names and all(map(_INTEGER.fullmatch, names)):
    return {int(name): child for name, child in children.items()}
  if kind == "node" and names is not None:
    return children
  if kind in ("dict", "none") and names == set():
    return {} if kind == "dict" else None
  raise errors.InputError(
    f"nodes/{path} is {kind!r}, which cannot have the children that the file "
    "lists"
  )


def _branch(top: dict[str, Any], path: str, keys: list[str]) -> dict[str, Any]:
  """Returns the dict at some keys; makes it where it is missing."""
  node: Any = top
  for key in keys:
    node = node.setdefault(key, {})
    if not isinstance(node, dict):
      raise errors.InputError(f"{path!r} lies within another variable")
  return node


def _escape(path: str, key: Any) -> str:
  name = str(key)
  text = _WRITTEN.get(name, name.replace("~", "~0").replace("/", "~1"))
  if not _KEY.fullmatch(text):
    raise errors.InputError(
      f"{path or 'the tree'} has a key that is no text, {key!r}; rename it"
    )
  return text


def _keys(path: str) -> list[str]:
  """Returns the keys of a path, after '' for the root."""
  if not path:
    return [""]
  parts = path.split("/", MAX_DEPTH + 1)
  if len(parts) > MAX_DEPTH or not all(map(_KEY.fullmatch, parts)):
    raise errors.InputError(
      f"{path[:80]!r} is not a path of at most {MAX_DEPTH} keys"
    )
  keys = (
    _MEANT.get(part, part.replace("~1", "/").replace("~0", "~"))
    for part in parts
  )
  return ["", *keys]

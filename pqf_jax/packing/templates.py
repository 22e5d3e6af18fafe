"""Fills a tree or module with the variables of a file."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
from jax import tree_util

from pqf_jax import errors
from pqf_jax.core import modules, trees, vq_array
from pqf_jax.packing import structure

PyTree = Any


def fill(template: PyTree, leaves: Mapping[str, Any]) -> PyTree:
  """Returns a tree like `template` with other leaves.

  Args:
    template: arrays, shapes or `VQArray`s, in any nodes; random keys stay.
    leaves: {path: array or `VQArray`}, see `structure`.

  Raises:
    InputError: the paths, or a dense shape or type, are not the template's; or
      a random key of the template is only a shape.
  """
  named, nodes = tree_util.tree_flatten_with_path(
    modules.seal(template), is_leaf=vq_array.is_vq
  )
  places = {structure.path_of_leaf(keys): leaf for keys, leaf in named}
  keys = {p: leaf for p, leaf in places.items() if trees.is_random_key(leaf)}
  for path, leaf in keys.items():
    if not isinstance(leaf, jax.Array):
      raise errors.InputError(
        f"{path} of the template is the shape of a random key, of which files "
        "hold none; give the key, as nnx.reseed(template, default=0) does"
      )
  taken = [path for path in places if path not in keys]
  _check_names(taken, leaves)
  for path in taken:
    _check_alike(path, places[path], leaves[path])
  filled = [leaves.get(path, leaf) for path, leaf in places.items()]
  return modules.unseal(jax.tree.unflatten(nodes, filled))


def _check_names(wanted: Collection[str], found: Collection[str]) -> None:
  missing = [path for path in wanted if path not in found]
  others = [path for path in found if path not in wanted]
  if missing or others:
    raise errors.InputError(
      f"the template has {_listed(missing)} that the file lacks, and the file "
      f"{_listed(others)} that the template lacks; give a template of the "
      "structure that was saved"
    )


def _listed(paths: list[str]) -> str:
  if not paths:
    return "nothing"
  more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
  return ", ".join(paths[:5]) + more


def _check_alike(path: str, wanted: Any, found: Any) -> None:
  expected, kind = map(_describe, (wanted, found))
  if expected != kind:
    raise errors.InputError(
      f"{path or 'the tree'} is {expected} in the template and {kind} in the "
      "file; give a template of the shapes and types that were saved"
    )


def _describe(leaf: Any) -> str:
  if not hasattr(leaf, "dtype"):
    return f"of type {type(leaf).__name__}"
  return f"{leaf.dtype} of shape {tuple(leaf.shape)}"

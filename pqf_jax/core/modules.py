"""Trees of any library as trees of arrays, and back.

NNX and Equinox modules hold more than variables: functions, settings, and in
NNX one variable in several places. `seal` hides that in the structure of the
tree, so that `jit` takes it and each variable has one path; `unseal` gives the
module back, with whatever its variables have become.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from flax import nnx
from flax.core import meta
from jax import tree_util

PyTree = Any

_PLAIN = (dict, list, tuple, type(None))


class Inputs:
  """The arguments of a network that takes several, some of them by name.

      pqf_jax.compress(
        model.apply, variables, pqf_jax.Inputs(tokens, mask, train=False), ...
      )

  Arrays and random keys are inputs; whatever else, such as flags and text,
  stays as it is. A sample that is no `Inputs` is the only argument.

  Attributes:
    args: by position.
    kwargs: by name.
  """

  def __init__(self, *args: PyTree, **kwargs: PyTree):
    self.args = args
    self.kwargs = kwargs

  def __repr__(self) -> str:
    named = (f"{name}={value!r}" for name, value in self.kwargs.items())
    return f"Inputs({', '.join([*map(repr, self.args), *named])})"


def _unflatten_inputs(_: None, parts: Iterable[Any]) -> Inputs:
  inputs = Inputs()
  inputs.args, inputs.kwargs = parts
  return inputs


tree_util.register_pytree_with_keys(
  Inputs,
  lambda inputs: (
    [
      (tree_util.GetAttrKey("args"), inputs.args),
      (tree_util.GetAttrKey("kwargs"), inputs.kwargs),
    ],
    None,
  ),
  _unflatten_inputs,
)


class Constant:
  """A leaf that is no array, as a node without leaves."""

  def __init__(self, value: Any):
    self.value = value

  def __repr__(self) -> str:
    return repr(self.value)

  def __eq__(self, other: Any) -> bool:
    return isinstance(other, Constant) and (
      self.value is other.value or bool(self.value == other.value)
    )

  def __hash__(self) -> int:
    try:
      return hash(self.value)
    except TypeError:
      return hash(type(self.value))


tree_util.register_pytree_node(
  Constant, lambda constant: ((), constant), lambda constant, _: constant
)


class Graph:
  """A tree with NNX variables, as nested dicts of their values.

  Attributes:
    values: {name: values below}.
    definition: all else, as `nnx.split` returns it.
    kinds: {path: the class of the variable there, None for a bare array}.
  """

  def __init__(
    self, values: dict[Any, Any], definition: Any, kinds: Mapping[str, Any]
  ):
    self.values = values
    self.definition = definition
    self.kinds = kinds


tree_util.register_pytree_with_keys(
  Graph,
  lambda graph: (
    [(tree_util.DictKey(key), graph.values[key]) for key in graph.values],
    (tuple(graph.values), graph.definition, tuple(graph.kinds.items())),
  ),
  lambda static, values: Graph(
    dict(zip(static[0], values, strict=True)), static[1], dict(static[2])
  ),
)


def seal(tree: PyTree) -> PyTree:
  """Returns a tree of arrays alone, which has each variable once.

  Dicts, lists, tuples, None and other nodes stay, and arrays may be shapes or
  nodes such as `VQArray`. Twice is as good as once.
  """
  leaves, structure = jax.tree.flatten(tree, is_leaf=_is_nnx)
  if any(map(_is_nnx, leaves)):
    definition, state = nnx.split(tree)
    kinds = {
      "/".join(map(str, keys)): (
        type(value) if isinstance(value, nnx.Variable) else None
      )
      for keys, value in nnx.to_flat_state(state)
    }
    return Graph(nnx.to_pure_dict(state), definition, kinds)
  # Of a plain tree it is a mistake, which others report.
  if _is_plain(structure) or all(map(_is_array, leaves)):
    return tree
  return jax.tree.unflatten(
    structure,
    [leaf if _is_array(leaf) else Constant(leaf) for leaf in leaves],
  )


def unseal(tree: PyTree) -> PyTree:
  """Returns the tree that was sealed, with its present leaves."""
  return jax.tree.map(
    _open, tree, is_leaf=lambda node: isinstance(node, Constant | Graph)
  )


def call(
  apply_fn: Callable[..., PyTree], variables: PyTree, inputs: PyTree
) -> PyTree:
  """Returns what a network gives for variables and inputs that are sealed."""
  return call_with(functools.partial(apply_fn, unseal(variables)), inputs)


def call_with(function: Callable[..., PyTree], inputs: PyTree) -> PyTree:
  """Returns what a function gives for inputs that are sealed."""
  args = unseal(inputs)
  if len(args) == 1 and isinstance(args[0], Inputs):
    return function(*args[0].args, **args[0].kwargs)
  return function(*args)


def parameters(tree: PyTree) -> set[str] | None:
  """Returns the paths of what NNX calls a `Param`; None without NNX."""
  graph = seal(tree)
  if not isinstance(graph, Graph):
    return None
  kinds = graph.kinds.items()
  return {path for path, kind in kinds if kind and issubclass(kind, nnx.Param)}


def bare_arrays(tree: PyTree) -> set[str]:
  """Returns the paths of arrays that an NNX module holds outside of variables.

  In their place it can hold nothing but arrays.
  """
  graph = seal(tree)
  kinds = graph.kinds if isinstance(graph, Graph) else {}
  return {path for path, kind in kinds.items() if kind is None}


def _open(node: Any) -> Any:
  if isinstance(node, Graph):
    return nnx.merge(node.definition, node.values)
  return node.value if isinstance(node, Constant) else node


def _is_nnx(node: Any) -> bool:
  return isinstance(node, nnx.Variable | nnx.Pytree)


def _is_array(leaf: Any) -> bool:
  return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _is_plain(structure: Any) -> bool:
  """Returns whether a tree has no nodes but those that Linen knows."""
  node = structure.node_data()
  return node is None or (
    (node[0] in _PLAIN or issubclass(node[0], meta.AxisMetadata))
    and all(map(_is_plain, structure.children()))
  )

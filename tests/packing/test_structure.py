import collections

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from hypothesis import strategies as st

from pqf_jax import errors
from pqf_jax.packing import structure


def assert_same(left, right):
  """Asserts equal containers, keys, types and bits."""
  assert type(left) is type(right)
  if isinstance(left, dict):
    assert left.keys() == right.keys()
    assert {type(key) for key in left} == {type(key) for key in right}
    for key, child in left.items():
      assert_same(child, right[key])
  elif isinstance(left, list | tuple):
    assert len(left) == len(right)
    for pair in zip(left, right, strict=True):
      assert_same(*pair)
  elif left is not None:
    assert (left.dtype, left.shape) == (right.dtype, right.shape)
    assert left.tobytes() == right.tobytes()


def trees(leaves):
  keys = st.text(st.sampled_from("ab/~0123\0ü"), max_size=4)
  keys |= st.just("__metadata__")
  return st.recursive(
    leaves | st.none() | st.sampled_from([{}, [], ()]),
    lambda children: (
      st.lists(children, max_size=12)
      | st.lists(children, max_size=3).map(tuple)
      | st.dictionaries(keys, children, max_size=3)
      | st.dictionaries(st.integers(-20, 20), children, max_size=3)
    ),
    max_leaves=20,
  )


@hypothesis.given(trees(st.integers(0, 9).map(np.array)))
@hypothesis.settings(deadline=None, max_examples=200)
def test_any_tree_comes_back(tree):
  leaves, nodes = structure.take_apart(tree, lambda node: False)
  assert len(leaves) == len(jax.tree.leaves(tree))
  assert_same(structure.put_together(leaves, nodes), tree)


def test_plain_trees_cost_nothing():
  tree = {"params": {"a": {"b": np.ones(2)}}}
  leaves, nodes = structure.take_apart(tree, lambda node: False)
  assert leaves.keys() == {"params/a/b"}
  assert not nodes


def nested(depth):
  tree = np.ones(1)
  for _ in range(depth):
    tree = {"a": tree}
  return tree


Pair = collections.namedtuple("Pair", "a b")


@pytest.mark.parametrize(
  ("tree", "message"),
  [
    ({"a": np.ma.ones(2)}, "a is of type MaskedArray"),
    ({"a": FrozenDict(), "b": "text"}, "b is of type str"),
    ({"a": {"b": 1.5}}, "a/b is of type float"),
    ({"a": {"b": "text"}}, "a/b is of type str"),
    ({"a": jax.ShapeDtypeStruct((1,), jnp.float32)}, "a is of type ShapeDtype"),
    ({"a": {1: 1, "b": 2}}, r"a has keys of the types \['int', 'str'\]"),
    ({10**18: np.ones(1)}, "integers of up to 18 digits"),
    ({True: np.ones(1)}, r"the tree has keys of the types \['bool'\]"),
    ({"\ud800": np.ones(1)}, "a key that is no text"),
    (nested(101), "more than 100 levels deep"),
  ],
)
def test_what_cannot_come_back_is_named(tree, message):
  with pytest.raises(errors.InputError, match=message):
    structure.take_apart(tree, lambda node: False)


@pytest.mark.parametrize(
  ("paths", "nodes", "message"),
  [
    (["a", "a/b"], {}, "within another variable"),
    (["a/b", "a"], {}, "two variables"),
    (["a//b"], {}, "not a path"),
    (["a/~4"], {}, "not a path"),
    (["a~"], {}, "not a path"),
    (["/".join("a" * 101)], {}, "not a path"),
    (["/" * 100_000], {}, "not a path"),
    (["\ud800"], {}, "not a path"),
    (["", "a"], {}, "within another|two variables"),
    (["a"], {"a": "dict"}, "within another|two variables"),
    (["a/b"], {"a": "dict"}, "nodes/a is 'dict'"),
    (["a/b"], {"a": "none"}, "nodes/a is 'none'"),
    (["a/b"], {"a": "list"}, "nodes/a is 'list'"),
    (["a/1"], {"a": "tuple"}, "nodes/a is 'tuple'"),
    (["a/00"], {"a": "list"}, "nodes/a is 'list'"),
    (["a/01"], {"a": "integers"}, "nodes/a is 'integers'"),
    (["a/" + "9" * 5000], {"a": "integers"}, "nodes/a is 'integers'"),
    ([], {"a": "integers"}, "nodes/a is 'integers'"),
    (["a/0/b"], {"a": "none", "a/0": "none"}, "nodes/a/0 is 'none'"),
  ],
)
def test_paths_that_make_no_tree_are_refused(paths, nodes, message):
  with pytest.raises(errors.InputError, match=message):
    structure.put_together(dict.fromkeys(paths, ()), nodes)

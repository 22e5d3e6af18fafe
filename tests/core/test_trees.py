import jax.numpy as jnp
import pytest

from pqf_jax import errors
from pqf_jax.core import trees


def test_paths_of_dicts_lists_and_integer_keys():
  tree = {"params": {"blocks": [{"bias": 1}, {"bias": 2}]}, "stats": {0: 3}}
  assert trees.flatten(tree) == {
    "params/blocks/0/bias": 1,
    "params/blocks/1/bias": 2,
    "stats/0": 3,
  }


def test_nest_undoes_flatten_for_dicts():
  tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
  assert trees.nest(trees.flatten(tree)) == tree


def test_ambiguous_paths_are_refused():
  with pytest.raises(errors.InputError, match="different paths"):
    trees.flatten({"a": {"b": 1}, "a/b": 2})


def test_replace_keeps_the_rest_and_names_what_is_unknown():
  tree = {"a": jnp.ones(2), "b": 1}
  assert trees.replace(tree, {"b": 2})["b"] == 2
  assert trees.replace(tree, {"b": 2})["a"] is tree["a"]
  with pytest.raises(errors.InputError, match=r"\['c'\]"):
    trees.replace(tree, {"c": 1})

"""Kernels that no other kernel comes before."""

import jax
import jax.numpy as jnp
import pytest

from pqf_jax.allocation import first_layers


def find(apply_fn, shapes, *inputs):
  variables = {
    name: jax.ShapeDtypeStruct(shape, jnp.float32)
    for name, shape in shapes.items()
  }
  kernels = [name for name, shape in shapes.items() if len(shape) > 1]
  return first_layers.find_first_kernels(apply_fn, variables, inputs, kernels)


X = jax.ShapeDtypeStruct((2, 4), jnp.float32)


def test_the_first_of_a_chain_through_casts_norms_and_calls():
  def apply_fn(v, x):
    x = (x - v["mean"][None]) / 2
    return jax.jit(lambda x: jnp.tanh(x @ (2 * v["b"])))(x) @ v["a"] @ v["c"]

  shapes = {"a": (4, 4), "b": (4, 4), "c": (4, 4), "mean": (4,)}
  assert find(apply_fn, shapes, X) == {"b"}


def test_each_branch_has_a_first():
  def apply_fn(v, x, y):
    return (x @ v["a"] + y @ v["b"]) @ v["c"] + x @ v["d"]

  shapes = dict.fromkeys("abcd", (4, 4))
  assert find(apply_fn, shapes, X, X) == {"a", "b", "d"}


def test_lookups_count_and_positions_do_not():
  def apply_fn(v, tokens):
    return (v["embedding"][tokens] + v["positions"][None]) @ v["head"]

  shapes = {"embedding": (9, 4), "positions": (3, 4), "head": (4, 9)}
  tokens = jax.ShapeDtypeStruct((2, 3), jnp.int32)
  assert find(apply_fn, shapes, tokens) == {"embedding"}


@pytest.mark.parametrize("stem", [False, True])
def test_layers_of_a_scan_come_after_what_is_before_it(stem: bool):
  def apply_fn(v, x):
    x = x @ v["stem"] if stem else x
    x, _ = jax.lax.scan(lambda x, w: (x @ w, None), x, v["stack"])
    return x @ v["head"]

  shapes = {"stack": (3, 4, 4), "stem": (4, 4), "head": (4, 4)}
  assert find(apply_fn, shapes, X) == ({"stem"} if stem else {"stack"})

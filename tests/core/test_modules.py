"""Modules become trees of arrays, and modules again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import tree_util

from pqf_jax.core import blocks, modules, trees, vq_array


class Net(nnx.Module):
  """A module with a list, statistics, a random stream and a tied layer."""

  def __init__(self, rngs):
    self.first = nnx.Linear(4, 4, rngs=rngs)
    self.norms = nnx.List([nnx.BatchNorm(4, rngs=rngs)])
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.tied = self.first

  def __call__(self, x):
    return self.tied(self.dropout(self.norms[0](self.first(x))))


@tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
  """A layer as Equinox writes them: arrays beside a function and a number."""

  weight: jax.Array
  activation: object
  scale: float

  def __call__(self, x):
    return self.activation(self.weight @ x) * self.scale


X = jnp.ones((3, 4))


@pytest.fixture(scope="module")
def net():
  net = Net(nnx.Rngs(0))
  net.eval()
  return net


@pytest.fixture
def layer():
  return Layer(jnp.eye(4), jnp.tanh, 2.0)


def test_a_tied_variable_of_nnx_has_one_path(net):
  paths = trees.flatten(net)
  assert {path for path in paths if "rngs" not in path} == {
    "first/kernel",
    "first/bias",
    *(f"norms/0/{name}" for name in ("scale", "bias", "mean", "var")),
  }
  back = modules.unseal(modules.seal(net))
  assert type(back) is Net and back.tied is back.first
  assert not back.dropout.rngs.count.get_value()
  np.testing.assert_array_equal(back(X), net(X))


def test_what_is_no_array_stays_as_it_is(layer):
  assert list(trees.flatten({"a": layer})) == ["a/weight"]
  doubled = trees.map_leaves(lambda leaf: 2 * leaf, layer)
  assert doubled.activation is jnp.tanh and doubled.scale == 2.0
  np.testing.assert_array_equal(doubled.weight, 2 * np.eye(4))


def test_what_is_sealed_can_be_an_argument_of_jit(net, layer):
  @jax.jit
  def run(sealed, inputs):
    return modules.call(lambda parts, *x: parts[0](*x), sealed, inputs)

  traced = run._cache_size
  for module, x in ((net, X), (layer, X[0])):
    expected = module(x)
    for _ in range(2):
      got = run(modules.seal([module]), (x,))
      np.testing.assert_allclose(got, expected, rtol=1e-6)
  assert traced() == 2


def test_sealing_twice_and_plain_trees_change_nothing(net):
  sealed = modules.seal(net)
  assert modules.seal(sealed) is sealed
  plain = {"a": [np.ones(2), None, (1.5, "text")]}
  assert modules.seal(plain) is plain
  with pytest.raises(ValueError, match="leaf 'a/2/0', is of type float"):
    trees.check_arrays("tree", plain)


def test_arguments_by_name_and_flags_reach_the_network():
  def apply(weight, x, *, flag, key):
    assert flag is True
    return weight * x + jax.random.uniform(key)

  inputs = modules.Inputs(X, flag=True, key=jax.random.key(0))
  assert list(trees.flatten(inputs)) == ["args/0", "kwargs/key"]
  got = jax.jit(lambda *sealed: modules.call(apply, *sealed))(
    2.0, modules.seal((inputs,))
  )
  expected = 2 * X + jax.random.uniform(jax.random.key(0))
  np.testing.assert_array_equal(got, expected)
  assert "flag=True" in repr(inputs)


def test_what_is_trained_by_default(net):
  codebook, codes = jnp.ones((2, 2)), jnp.zeros((4, 2), jnp.uint8)
  node = vq_array.VQArray(codebook, codes, (4, 4), blocks.BlockSpec(2))
  quantized = trees.replace(net, {"first/kernel": node})

  def trained(variables):
    trainable, frozen = vq_array.split_trainable(variables)
    merged = vq_array.merge_trainable(trainable, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(variables)
    return set(trees.flatten(trainable))

  assert trained(quantized) == {
    "first/kernel/codebook",
    "first/bias",
    "norms/0/scale",
    "norms/0/bias",
  }
  own = {"w": node, "scale": X, "steps": jnp.zeros((), jnp.int32)}
  assert trained(own) == {"w/codebook", "scale"}
  linen = {"params": own, "batch_stats": {"mean": X}}
  assert trained(linen) == {"params/w/codebook", "params/scale"}

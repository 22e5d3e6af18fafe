"""The one-call form, on a network and a tree of the user's own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pqf_jax
from pqf_jax.core import trees, vq_array


class Net(nn.Module):
  @nn.compact
  def __call__(self, images):
    x = nn.relu(nn.Conv(16, (3, 3), name="stem")(images))
    for i in range(2):
      x = x + nn.relu(nn.Conv(16, (3, 3), name=f"conv{i}")(x))
    return nn.Dense(32, name="head")(x.mean((1, 2)))


RULES = [
  pqf_jax.Rule("params/stem/kernel", None),
  pqf_jax.Rule("params/head/kernel", 64, channels=4, kmeans_steps=20),
  pqf_jax.Rule("params/.*/kernel", 32, channels=2, kmeans_steps=20),
]
IMAGES = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))


@pytest.fixture(scope="module")
def variables():
  return Net().init(jax.random.key(0), IMAGES)


@pytest.fixture(scope="module")
def compressed(variables):
  return pqf_jax.compress(
    Net().apply, variables, IMAGES, RULES, key=jax.random.key(0)
  )


def test_only_the_quantization_changes_the_function(variables, compressed):
  """Its dense kernels, permuted, give the logits; the codes come close."""
  nodes = trees.flatten(compressed.variables, vq_array.is_vq)
  assert {path for path, leaf in nodes.items() if vq_array.is_vq(leaf)} == {
    "params/conv0/kernel",
    "params/conv1/kernel",
    "params/head/kernel",
  }
  expected = Net().apply(variables, IMAGES)
  got = Net().apply(compressed.variables, IMAGES)
  error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
  assert error < 0.5  # a wrong permutation gives about sqrt(2)


def test_what_is_saved_has_the_size_that_was_said(compressed, tmp_path):
  packed = pqf_jax.save(tmp_path / "m.safetensors", compressed.variables)
  assert packed.payload_bytes == compressed.size.payload_bytes
  loaded = pqf_jax.load(tmp_path / "m.safetensors")
  np.testing.assert_allclose(
    Net().apply(loaded, IMAGES),
    Net().apply(compressed.variables, IMAGES),
    atol=2e-3,
  )


def test_groups_gain_and_layers_lose_as_reported(compressed):
  accepted = [group for group in compressed.groups if group.accepted]
  assert accepted
  assert all(g.log_det_after < g.log_det_before for g in accepted)
  assert all(0 < layer.distortion < 1 for layer in compressed.layers.values())


def test_it_can_be_fine_tuned_by_hand(compressed):
  trainable, frozen = pqf_jax.split_trainable(compressed.variables)

  def loss(trainable):
    variables = pqf_jax.merge_trainable(trainable, frozen)
    return jnp.square(Net().apply(variables, IMAGES)).mean()

  gradients = jax.grad(loss)(trainable)
  moved = jax.tree.map(lambda w, g: w - 0.1 * g, trainable, gradients)
  assert loss(moved) < loss(trainable)


def test_every_public_name_exists():
  for name in pqf_jax.__all__:
    assert getattr(pqf_jax, name).__module__.startswith("pqf_jax.")
  with pytest.raises(AttributeError, match="no attribute 'typo'"):
    getattr(pqf_jax, "ty" + "po")

"""Compression in one call, and the public names, as a user sees them."""

import ast
import importlib
import pathlib
import re
import textwrap

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pqf_jax
from pqf_jax import budget, errors, permute
from pqf_jax.core import trees, vq_array


class Net(nn.Module):
  @nn.compact
  def __call__(self, images):
    x = nn.relu(nn.Conv(16, (3, 3), name="stem")(images))
    for i in range(2):
      x = x + nn.relu(nn.Conv(16, (3, 3), name=f"conv{i}")(x))
    return nn.Dense(32, name="head")(x.mean((1, 2)))


RULES = [
  pqf_jax.Rule("params/(stem|head)/kernel", None),
  pqf_jax.Rule("params/.*/kernel", 32, channels=2, kmeans_steps=20),
]
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(2, 8, 8, 3)).astype(np.float32)
EXAMPLE = textwrap.dedent(
  "".join(re.findall(r"^    .*\n|^\n", pqf_jax.__doc__, re.M))
)


@pytest.fixture(scope="module")
def variables():
  shapes = jax.eval_shape(Net().init, jax.random.key(0), IMAGES)
  return jax.tree.map(
    lambda leaf: jnp.asarray(
      RNG.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1])),
      jnp.float32,
    ),
    shapes,
  )


@pytest.fixture(scope="module")
def compressed(variables):
  return pqf_jax.compress(
    Net().apply, variables, IMAGES, RULES, key=jax.random.key(0)
  )


@pytest.fixture(scope="module")
def apply():
  return jax.jit(Net().apply)


def test_only_the_quantization_changes_the_function(
  variables, compressed, apply
):
  """Its dense kernels, permuted, give the logits; the codes come close."""
  nodes = trees.flatten(compressed.variables, vq_array.is_vq)
  assert {path for path, leaf in nodes.items() if vq_array.is_vq(leaf)} == {
    "params/conv0/kernel",
    "params/conv1/kernel",
  }
  expected = apply(variables, IMAGES)
  got = apply(compressed.variables, IMAGES)
  error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
  assert error < 0.5  # a wrong permutation gives about sqrt(2)


def test_the_example_of_the_package_runs(
  variables, compressed, apply, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  names = {"model": Net(), "images": IMAGES, "rules": RULES}
  names |= {"variables": variables, "jax": jax, "pqf_jax": pqf_jax}
  exec(EXAMPLE, names)
  jax.tree.map(
    np.testing.assert_array_equal,
    names["result"].variables,
    compressed.variables,
  )
  expected = apply(compressed.variables, IMAGES)
  np.testing.assert_allclose(names["logits"], expected, atol=2e-3)
  packed = pqf_jax.pack_model(
    compressed.variables, norm_epsilon=1e-5, architecture={}
  )
  assert packed.payload_bytes == compressed.size.payload_bytes


def test_groups_gain_and_layers_lose_as_reported(compressed):
  accepted = [group for group in compressed.groups if group.accepted]
  assert accepted
  assert all(g.log_det_after < g.log_det_before for g in accepted)
  assert all(0 < layer.distortion < 1 for layer in compressed.layers.values())


def test_it_can_be_fine_tuned_by_hand(compressed):
  trainable, frozen = pqf_jax.split_trainable(compressed.variables)

  @jax.jit
  def loss(trainable):
    variables = pqf_jax.merge_trainable(trainable, frozen)
    return jnp.square(Net().apply(variables, IMAGES)).mean()

  gradients = jax.jit(jax.grad(loss))(trainable)
  moved = jax.tree.map(lambda w, g: w - 0.1 * g, trainable, gradients)
  assert loss(moved) < loss(trainable)


def test_every_public_name_exists_and_is_declared_for_type_checkers():
  declared = {
    alias.asname: f"{node.module}.{alias.name}"
    for node in ast.walk(ast.parse(pathlib.Path(pqf_jax.__file__).read_text()))
    if isinstance(node, ast.ImportFrom) and node.module.startswith("pqf_jax.")
    for alias in node.names
  }
  assert declared.keys() == set(pqf_jax.__all__)
  for name, full_name in declared.items():
    module, _, attribute = full_name.rpartition(".")
    home = importlib.import_module(module)
    assert getattr(pqf_jax, name) is getattr(home, attribute)
  with pytest.raises(AttributeError, match="no attribute 'typo'"):
    getattr(pqf_jax, "ty" + "po")


def test_what_cannot_be_compressed_is_named(variables, compressed):
  def refused(message, **changed):
    arguments = {"variables": variables, "sample": IMAGES, "rules": RULES}
    with pytest.raises(errors.InputError, match=message):
      pqf_jax.compress(
        Net().apply, **arguments | changed, key=jax.random.key(0)
      )

  refused("2 kernels are compressed already", variables=compressed.variables)
  shapes = jax.eval_shape(lambda: (variables, IMAGES))
  refused("'params/conv0/bias', is of type ShapeDtype", variables=shapes[0])
  refused("sample is of type ShapeDtypeStruct", sample=shapes[1])
  refused("give a list of pqf_jax.Rule", rules=RULES[1])
  refused("no rule covers params/conv0/kernel", rules=[])


@pytest.mark.parametrize(
  ("calibration", "message"),
  [
    (IMAGES, "calibration is of type ndarray; give a list"),
    (iter([IMAGES]), "calibration is of type list_iterator"),
    ([IMAGES, IMAGES[:1]], "batch 1 of calibration has other shapes"),
    ([IMAGES[..., :2]], "cannot be traced"),
    ([IMAGES * np.nan], "batch 0 of calibration has NaN"),
    ([IMAGES[:0]], "batch 0 of calibration is empty"),
  ],
)
def test_samples_are_checked_before_the_work(
  variables, calibration, message, monkeypatch
):
  monkeypatch.setattr(permute, "permute_channels", None)
  for rules in ({"rules": RULES}, {"rules": "auto", "target_ratio": 4}):
    with pytest.raises(errors.InputError, match=message):
      pqf_jax.compress(
        Net().apply,
        variables,
        IMAGES,
        **rules,
        key=jax.random.key(0),
        calibration=calibration,
      )


def test_rules_can_be_chosen_for_a_target(variables, compressed, monkeypatch):
  asked = {}

  def choose(apply_fn, variables, sample, **settings):
    asked.update(settings)
    return RULES

  monkeypatch.setattr(budget, "auto_rules", choose)
  result = pqf_jax.compress(
    Net().apply,
    variables,
    IMAGES,
    "auto",
    key=jax.random.key(0),
    target_ratio=3,
  )
  assert asked == {
    "target_ratio": 3,
    "target_bytes": None,
    "batches": [],
    "mask_fn": None,
  }
  assert result.plan == compressed.plan


def test_targets_and_rules_that_contradict_are_refused(variables):
  def refused(message, rules, **targets):
    with pytest.raises(errors.InputError, match=message):
      pqf_jax.compress(
        Net().apply, variables, IMAGES, rules, key=jax.random.key(0), **targets
      )

  refused("target_ratio 3 and", RULES, target_ratio=3)
  refused("target_bytes 9; give a list", RULES, target_bytes=9)
  refused("rules is 'all'", "all", target_bytes=9)
  refused("give one of them", "auto")
  refused("give one of them", "auto", target_ratio=3, target_bytes=9000)
  refused("of which 320 are no kernels", "auto", target_bytes=9)


def test_the_root_may_be_a_tuple():
  kernels = tuple(
    {"kernel": jnp.asarray(RNG.normal(size=(16, 16)), jnp.float32)}
    for _ in range(2)
  )

  def apply(layers, x):
    return nn.relu(x @ layers[0]["kernel"][...]) @ layers[1]["kernel"][...]

  rules = [pqf_jax.Rule("./kernel", 16, kmeans_steps=5)]
  result = pqf_jax.compress(
    apply, kernels, IMAGES.reshape(-1, 16), rules, key=jax.random.key(0)
  )
  assert isinstance(result.variables, tuple)
  assert all(vq_array.is_vq(layer["kernel"]) for layer in result.variables)


def test_calibration_brings_the_outputs_nearer(variables, compressed):
  batches = list(RNG.normal(size=(2, 16, 8, 8, 3)).astype(np.float32))
  calibrated = pqf_jax.compress(
    Net().apply,
    variables,
    IMAGES,
    RULES,
    key=jax.random.key(0),
    calibration=batches,
  )
  assert not compressed.outputs
  assert set(calibrated.outputs) == set(calibrated.plan)

  def error(tree):
    return sum(
      jnp.square(Net().apply(tree, x) - Net().apply(variables, x)).sum()
      for x in batches
    )

  assert error(calibrated.variables) < 0.5 * error(compressed.variables)
  with pytest.raises(errors.InputError, match="calibration, leaf '0'"):
    pqf_jax.compress(
      Net().apply,
      variables,
      IMAGES,
      RULES,
      key=jax.random.key(0),
      calibration=[jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)],
    )

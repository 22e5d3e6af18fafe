"""Networks of any library: compressed, trained, saved as what they are."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

import pqf_jax
from pqf_jax import errors, inference
from pqf_jax.core import trees, vq_array

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(2, 6, 6, 3)).astype(np.float32)
RULES = [
  pqf_jax.Rule("stem/kernel", None),
  pqf_jax.Rule(".*", 16, kmeans_steps=5),
]
KEY = jax.random.key(0)


class Net(nnx.Module):
  """A convolutional network with what NNX modules have besides variables."""

  def __init__(self, rngs):
    self.stem = nnx.Conv(3, 16, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(16, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.layers = nnx.List([nnx.Linear(16, 16, rngs=rngs) for _ in range(2)])
    self.tied = self.layers[0]
    self.mix = jnp.eye(16)  # no variable

  def __call__(self, images, *, scale=1):
    x = nnx.relu(self.norm(self.stem(images)))
    for layer in (*self.layers, self.tied):
      x = nnx.relu(layer(self.dropout(x)))
    return scale * (x.mean((1, 2)) @ self.mix)


@pytest.fixture(scope="module")
def net():
  net = Net(nnx.Rngs(0))
  net.eval()
  return net


@pytest.fixture(scope="module")
def compressed(net):
  return pqf_jax.compress(net, sample=IMAGES, rules=RULES, key=KEY)


def test_an_nnx_module_comes_back_as_one(net, compressed):
  """It is applied as it is; its own variables are another network's."""
  small = compressed.variables
  assert type(small) is Net and small.tied is small.layers[0]
  assert [vq_array.is_vq(layer.kernel[...]) for layer in net.layers] == [0, 0]
  kernels = [layer.kernel.get_value() for layer in small.layers]
  assert list(map(vq_array.is_vq, kernels)) == [True, True]
  assert list(compressed.plan) == ["layers/0/kernel", "layers/1/kernel"]
  np.testing.assert_allclose(
    nnx.jit(lambda net, x: net(x))(small, IMAGES),
    pqf_jax.decode_params(small)(IMAGES),
    rtol=1e-5,
    atol=1e-6,
  )


def test_a_function_of_the_module_or_its_state_gives_the_same(net, compressed):
  definition, state = nnx.split(net)

  def apply(state, images, *, doubled, scale):
    assert doubled is True
    return nnx.merge(definition, state)(images, scale=scale)

  result = pqf_jax.compress(
    apply,
    state,
    pqf_jax.Inputs(IMAGES, doubled=True, scale=jnp.float32(2)),
    RULES,
    key=KEY,
  )
  assert isinstance(result.variables, nnx.State)
  got, expected = map(trees.flatten, (result.variables, compressed.variables))
  assert got.keys() == expected.keys()
  for path in compressed.plan:
    for part in ("codes", "codebook"):
      np.testing.assert_array_equal(
        got[f"{path}/{part}"], expected[f"{path}/{part}"]
      )


def test_stacked_layers_of_nnx_have_a_codebook_each():
  class Stack(nnx.Module):
    def __init__(self, rngs):
      make = nnx.vmap(lambda rngs: nnx.Linear(16, 16, rngs=rngs))
      self.layers = nnx.split_rngs(splits=3)(make)(rngs)

    def __call__(self, x):
      run = nnx.scan(
        lambda layer, x: nnx.relu(layer(x)),
        in_axes=(0, nnx.Carry),
        out_axes=nnx.Carry,
      )
      return run(self.layers, x)

  result = pqf_jax.compress(
    Stack(nnx.Rngs(0)),
    sample=IMAGES[..., :1] @ np.ones((1, 16), np.float32),
    rules=RULES[1:],
    key=KEY,
  )
  kernel = result.variables.layers.kernel.get_value()
  assert kernel.codebook.shape[:2] == (3, 16)


def test_calibration_and_targets_take_inputs_too():
  variables = {
    name: jnp.asarray(RNG.normal(size=(16, 16)) / 4, jnp.float32)
    for name in "ab"
  }

  def apply(variables, x, *, scale, rounded):
    x = jax.nn.relu(x @ variables["a"]) @ variables["b"]
    return scale * (jnp.round(x) if rounded else x)

  def inputs():
    x = jnp.asarray(RNG.normal(size=(64, 16)), jnp.float32)
    return pqf_jax.Inputs(x, scale=jnp.float32(2), rounded=False)

  result = pqf_jax.compress(
    apply,
    variables,
    inputs(),
    target_ratio=3,
    key=KEY,
    calibration=[inputs(), inputs()],
  )
  assert result.outputs
  assert all(error.after < error.before for error in result.outputs.values())


def test_a_step_trains_the_module_as_nnx_does(net):
  """Parameters follow the gradient, statistics the batch, as Flax computes."""

  def loss_fn(net, batch, key):
    net.train()
    outputs = nnx.relu(net.norm(net.stem(batch["images"])))
    del key
    return jnp.square(outputs - 1).mean(), (net, {})

  batch = {"images": IMAGES}
  optimizer = optax.sgd(0.5)
  step = pqf_jax.make_finetune_step(loss_fn, optimizer)
  state, _ = step(pqf_jax.init_state(net, optimizer), batch)
  got = pqf_jax.state_variables(state)
  assert type(got) is Net and got.tied is got.layers[0]

  expected = nnx.clone(net)
  gradients = nnx.grad(lambda net: loss_fn(net, batch, KEY)[0])(expected)
  for name in ("kernel", "bias"):
    moved = getattr(net.stem, name)[...] - 0.5 * gradients["stem"][name][...]
    np.testing.assert_allclose(
      getattr(got.stem, name)[...], moved, rtol=1e-4, atol=1e-6
    )
  for name in ("mean", "var"):
    wanted = getattr(expected.norm, name)[...]
    assert not np.allclose(wanted, getattr(net.norm, name)[...])
    np.testing.assert_allclose(getattr(got.norm, name)[...], wanted, rtol=1e-5)


def test_codebooks_of_a_module_are_trained_and_codes_are_not(compressed):
  def loss_fn(net, batch, key):
    del key
    return jnp.square(net(batch["images"]) - 1).mean(), ({}, {})

  optimizer = optax.sgd(0.1)
  step = pqf_jax.make_finetune_step(loss_fn, optimizer)
  state = pqf_jax.init_state(compressed.variables, optimizer)
  losses = []
  for _ in range(3):
    state, metrics = step(state, {"images": IMAGES})
    losses.append(float(metrics["loss"]))
  assert losses[2] < losses[0]
  before, after = map(
    trees.flatten, (compressed.variables, pqf_jax.state_variables(state))
  )
  for path in compressed.plan:
    assert not np.array_equal(
      before[f"{path}/codebook"], after[f"{path}/codebook"]
    )
    np.testing.assert_array_equal(
      before[f"{path}/codes"], after[f"{path}/codes"]
    )


def test_statistics_of_a_module_are_calibrated(net):
  """Its norm gives each channel the mean and variance that it has dense."""
  noisy = trees.flatten(net)["stem/kernel"] + jnp.asarray(
    RNG.normal(size=(3, 3, 3, 16)) / 4, jnp.float32
  )
  coarse = trees.replace(net, {"stem/kernel": noisy})
  result, _ = pqf_jax.calibrate_params(
    lambda net, x: net(x), net, coarse, [(IMAGES,)]
  )

  def moments(net):
    x = net.norm(net.stem(IMAGES))
    return np.array([x.mean((0, 1, 2)), x.std((0, 1, 2))])

  assert type(result) is Net
  np.testing.assert_allclose(moments(result), moments(net), atol=1e-3)
  assert not np.allclose(moments(coarse), moments(net), atol=0.1)


@pytest.mark.parametrize("form", ["dense", "layer", "fused"])
def test_a_module_is_applied_without_its_dense_kernels(form, compressed):
  net = compressed.variables
  network = inference.make_apply(
    lambda net, *args, **kwargs: net(*args, **kwargs), net, form
  )
  got = network.apply_fn(
    network.variables, pqf_jax.Inputs(IMAGES, scale=jnp.float32(2))
  )
  np.testing.assert_allclose(got, 2 * net(IMAGES), rtol=1e-4, atol=1e-5)


def test_a_module_is_exported(compressed, tmp_path):
  net = compressed.variables
  pqf_jax.export(tmp_path / "net", lambda net, x: net(x), net, IMAGES)
  program = jax.export.deserialize((tmp_path / "net").read_bytes())
  np.testing.assert_allclose(
    program.call(IMAGES), net(IMAGES), rtol=1e-4, atol=1e-5
  )


# ---- files -------------------------------------------------------------------


def test_a_module_comes_back_from_its_file(compressed, tmp_path):
  """Into another one, whose variables and random keys may be anything."""
  file = tmp_path / "model.safetensors"
  packed = pqf_jax.save(file, compressed.variables)
  assert packed.payload_bytes == compressed.size.payload_bytes

  template = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
  with pytest.raises(errors.InputError, match="rngs/key of .*nnx.reseed"):
    pqf_jax.load(file, template)
  nnx.reseed(template, default=0)
  with pytest.raises(errors.InputError, match="file mix that the template"):
    pqf_jax.load(file, template)
  template = Net(nnx.Rngs(1))
  template.eval()
  loaded = pqf_jax.load(file, template)
  assert type(loaded) is Net and loaded.tied is loaded.layers[0]
  kernels = [layer.kernel.get_value() for layer in loaded.layers]
  assert all(map(vq_array.is_vq, kernels))
  np.testing.assert_allclose(
    loaded(IMAGES), compressed.variables(IMAGES), atol=1e-3
  )
  values = pqf_jax.load(file)
  assert isinstance(values, dict) and set(values["layers"]) == {0, 1}


Pair = collections.namedtuple("Pair", "left right")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
  """A module as Equinox makes them."""

  weight: jax.Array
  activation: object


TREES = {
  "names with /": {"mlp/~/linear_0": {"w": np.ones((2, 3), np.float32)}},
  "frozen dict": FrozenDict(a=np.ones(2, np.float32)),
  "tuples": (Pair([np.ones(2)], None), {3: np.zeros(1, np.int8)}),
  "ordered": [collections.OrderedDict(b=np.ones(2), a=np.zeros(3))],
  "module": {"layer": Layer(np.ones((2, 2), np.float32), jnp.tanh)},
  "state": nnx.State({"b": nnx.Param(jnp.ones(2)), "c": {"d": jnp.ones(3)}}),
}


@pytest.mark.parametrize("name", TREES)
def test_any_tree_comes_back_into_a_template(name, tmp_path):
  tree = TREES[name]
  pqf_jax.save(tmp_path / "file", tree)
  loaded = pqf_jax.load(tmp_path / "file", trees.shapes(tree))
  assert jax.tree.structure(loaded) == jax.tree.structure(tree)
  for got, expected in zip(
    trees.leaves(loaded), trees.leaves(tree), strict=True
  ):
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", ["frozen dict", "tuples", "ordered", "module"])
def test_a_tree_of_other_nodes_needs_its_template(name, tmp_path):
  pqf_jax.save(tmp_path / "file", TREES[name])
  with pytest.raises(errors.InputError, match=r"pqf_jax.load\(path, template"):
    pqf_jax.load(tmp_path / "file")


@pytest.mark.parametrize(
  ("template", "message"),
  [
    ({"a": np.ones(2), "c": np.ones(1)}, "has c that the file .* file b that"),
    ({"a": np.ones(2)}, "has nothing that the file lacks, and the file b that"),
    (
      {"a": np.ones(3), "b": np.ones(1)},
      r"a is float64 of shape \(3,\) in",
    ),
    ({"a": np.ones(2, int), "b": np.ones(1)}, "a is int64 of .* in the templ"),
    ({"a": 1.5, "b": np.ones(1)}, "a is of type float in the template"),
    ([np.ones(2), np.ones(1)], "has 0, 1 that the file lacks, .* file a, b "),
  ],
)
def test_a_template_that_does_not_fit_is_named(template, message, tmp_path):
  pqf_jax.save(tmp_path / "file", {"a": np.ones(2), "b": np.ones(1)})
  with pytest.raises(errors.InputError, match=message):
    pqf_jax.load(tmp_path / "file", template)


# ---- what is refused ---------------------------------------------------------


def test_what_holds_no_variables_is_refused(net):
  def refused(message, *arguments, **named):
    with pytest.raises(errors.InputError, match=message):
      pqf_jax.compress(*arguments, key=KEY, **named)

  refused("is a function, which holds none", lambda x: x, sample=IMAGES)
  refused("sample is None; give an example", net)
  refused("sample is 'auto'.*by name", net, IMAGES, "auto")
  refused("give one of them", net, sample=IMAGES)
  axes = pqf_jax.KernelAxes((0,), (1,))
  rules = [pqf_jax.Rule("mix", 16, axes=axes), *RULES]
  refused("mix is a bare array of an", net, sample=IMAGES, rules=rules)

"""The networks of docs/any_network.md are compressed as it says."""

import functools
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import pqf_jax
from pqf_jax import inference, kmeans
from pqf_jax.core import channels, modules, trees, vq_array
from pqf_jax.discovery import discover
from pqf_jax.kmeans import reference

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "any_network.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(2, 8, 8, 3)).astype(np.float32)
KEY = jax.random.key(0)


# ---- networks as anybody would write them ------------------------------------


class Block(nnx.Module):
  def __init__(self, features, rngs):
    conv = functools.partial(nnx.Conv, features, features, (3, 3), rngs=rngs)
    self.conv1, self.conv2 = conv(), conv()
    self.norm1 = nnx.BatchNorm(features, rngs=rngs)
    self.norm2 = nnx.BatchNorm(features, rngs=rngs)

  def __call__(self, x):
    y = nnx.relu(self.norm1(self.conv1(x)))
    return nnx.relu(x + self.norm2(self.conv2(y)))


class ResNet(nnx.Module):
  def __init__(self, rngs):
    self.stem = nnx.Conv(3, 16, (3, 3), rngs=rngs)
    self.blocks = nnx.List([Block(16, rngs)])
    self.dropout = nnx.Dropout(0.1, rngs=rngs)
    self.head = nnx.Linear(16, 10, rngs=rngs)

  def __call__(self, images):
    x = self.stem(images)
    for block in self.blocks:
      x = block(x)
    return self.head(self.dropout(x.mean((1, 2))))


class Encoder(nn.Module):
  """A layer of a transformer; `nn.scan` carries x."""

  causal: bool = False
  train: bool = False

  @nn.compact
  def __call__(self, x, _=None):
    mask = nn.make_causal_mask(x[..., 0]) if self.causal else None
    y = nn.LayerNorm()(x)
    x = x + nn.MultiHeadAttention(num_heads=2)(y, mask=mask)
    y = nn.gelu(nn.Dense(64)(nn.LayerNorm()(x)))
    y = nn.Dropout(0.1, deterministic=not self.train)(y)
    return x + nn.Dense(32)(y), None


class ViT(nn.Module):
  @nn.compact
  def __call__(self, images, *, train):
    x = nn.Conv(32, (4, 4), strides=4, name="patches")(images)
    x = x.reshape(len(x), -1, 32)
    x = x + self.param("places", nn.initializers.normal(), (1, *x.shape[1:]))
    x, _ = Encoder(train=train, name="encoder")(x)
    return nn.Dense(10, name="head")(nn.LayerNorm()(x).mean(1))


class Decoder(nn.Module):
  @nn.compact
  def __call__(self, tokens):
    embed = nn.Embed(64, 32)
    layers = nn.scan(
      Encoder,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=2,
    )
    x, _ = layers(causal=True)(embed(tokens), None)
    return embed.attend(nn.LayerNorm()(x))


@pytest.fixture
def make_cnn():
  eqx = pytest.importorskip("equinox")

  class CNN(eqx.Module):
    stem: eqx.nn.Conv2d
    conv: eqx.nn.Conv2d
    mlp: eqx.nn.MLP
    activation: object

    def __init__(self, key):
      self.stem = eqx.nn.Conv2d(3, 16, 3, padding=1, key=key)
      self.conv = eqx.nn.Conv2d(16, 32, 3, padding=1, key=key)
      self.mlp = eqx.nn.MLP(32, 10, 64, 1, key=key)
      self.activation = jax.nn.relu

    def __call__(self, image):
      x = self.activation(self.stem(image))
      return self.mlp(self.activation(self.conv(x)).mean((1, 2)))

  return CNN


# ---- the blocks --------------------------------------------------------------


def _nearest_of_the_first(keys, vectors, *, num_codes, **_):
  """Takes the first K sub-vectors as codewords, which compiles nothing."""
  results = []
  for rows in map(np.asarray, vectors):
    errors = reference.distances(rows, rows[:num_codes])
    lost = errors.min(axis=1).mean(keepdims=True)
    codes = jnp.asarray(errors.argmin(axis=1), jnp.int32)
    codebook = jnp.asarray(rows[:num_codes])
    results.append(kmeans.KMeansResult(codebook, codes, lost, rows.var()))
  return results


@pytest.fixture(autouse=True)
def _as_users_do(monkeypatch, tmp_path):
  """No real k-means, files in a folder of the test, JAX as it is by default.

  Haiku and Equinox mix types and ranks.
  """
  monkeypatch.setattr(kmeans, "kmeans_of_layers", _nearest_of_the_first)
  monkeypatch.chdir(tmp_path)
  with (
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
  ):
    yield


def _run(start, monkeypatch, **names):
  """Runs the block that begins so; returns its names and the tied axes."""
  (block,) = (block for block in BLOCKS if block.startswith(start))
  assert len([line for line in block.splitlines() if line.strip()]) <= 8
  found = []

  def discover_channels(*arguments):
    found.append(original(*arguments))
    return found[0]

  original = discover.discover_channels
  monkeypatch.setattr(discover, "discover_channels", discover_channels)
  names |= {"jax": jax, "nnx": nnx, "pqf_jax": pqf_jax, "key": KEY}
  exec(block, names)
  return names, found[0]


def _check(names, apply_fn, dense, axes, *inputs):
  """Permutes all groups at random and runs the network itself in float64."""
  result = names["result"]
  assert 4.85 < result.size.ratio < 5.5
  assert type(result.variables) is type(dense)
  sizes = channels.group_sizes(dense, axes)
  assert sizes
  permuted = channels.apply_permutations(
    dense, axes, {group: RNG.permutation(sizes[group]) for group in sizes}
  )

  def widened(tree):
    def widen(leaf):
      is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
      return np.asarray(leaf, np.float64) if is_float else leaf

    return trees.map_leaves(widen, tree)

  @jax.jit
  def run(*sealed):
    return modules.call(apply_fn, *sealed)

  with jax.enable_x64(True):
    expected, got = (
      run(modules.seal(widened(tree)), widened(inputs))
      for tree in (dense, permuted)
    )
  assert got.dtype == np.float64
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10)


def test_nnx_resnet(monkeypatch):
  dense = ResNet(nnx.Rngs(0))
  dense.eval()
  names, axes = _run("net = ResNet", monkeypatch, ResNet=ResNet, images=IMAGES)
  _check(names, lambda net, x: net(x), dense, axes, IMAGES)
  assert type(names["net"]) is ResNet
  np.testing.assert_allclose(
    names["logits"], names["result"].variables(IMAGES), atol=1e-3
  )

  (block,) = (block for block in BLOCKS if "def loss_fn" in block)
  names |= {"jnp": jnp, "optax": optax}
  exec(block, names)
  moved = names["net"].blocks[0].norm1
  assert not np.array_equal(moved.mean[...], dense.blocks[0].norm1.mean[...])
  codebooks = names["net"].blocks[0].conv1.kernel.get_value()
  assert vq_array.is_vq(codebooks)


def test_linen_vit(monkeypatch):
  names, axes = _run("model = ViT", monkeypatch, ViT=ViT, images=IMAGES)

  def apply(variables, images):
    return ViT().apply(variables, images, train=False)

  _check(names, apply, names["variables"], axes, IMAGES)
  assert names["logits"].shape == (2, 10)


def test_scanned_decoder(monkeypatch):
  tokens = RNG.integers(0, 64, (2, 6))
  names, axes = _run(
    "model = Decoder", monkeypatch, Decoder=Decoder, tokens=tokens
  )
  _check(names, Decoder().apply, names["variables"], axes, tokens)
  assert names["logits"].shape == (2, 6, 64)


def test_haiku_mlp(monkeypatch):
  hk = pytest.importorskip("haiku")
  x = RNG.normal(size=(4, 32)).astype(np.float32)
  names, axes = _run("network = hk", monkeypatch, hk=hk, x=x)
  dense = names["network"].init(KEY, x)
  apply = names["network"].apply
  _check(names, apply, dense, axes, None, x)
  np.testing.assert_allclose(
    names["outputs"], apply(names["result"].variables, None, x), atol=1e-3
  )


def test_a_haiku_network_with_state(monkeypatch):
  """Its norms' statistics follow the channels of their layers."""
  hk = pytest.importorskip("haiku")

  def forward(x, training):
    x = hk.BatchNorm(True, True, 0.9)(hk.Linear(16)(x), training)
    return hk.Linear(8)(jax.nn.relu(x))

  network = hk.transform_with_state(forward)
  x = RNG.normal(size=(4, 8)).astype(np.float32)
  params, state = network.init(KEY, x, True)

  def apply(variables, x):
    parts = variables["params"], variables["state"]
    return network.apply(*parts, None, x, False)[0]

  axes = pqf_jax.discover_channels(apply, {"params": params, "state": state}, x)
  assert set(axes) == {
    "params/linear/w",
    "params/linear/b",
    "params/linear_1/w",
    "params/batch_norm/scale",
    "params/batch_norm/offset",
    "state/batch_norm/~/mean_ema/average",
    "state/batch_norm/~/var_ema/average",
  }


def _trains_by_equinox(mlp):
  import equinox as eqx

  @eqx.filter_jit
  @eqx.filter_grad
  def gradients(mlp):
    return jnp.square(mlp(jnp.ones(32)) - 1).sum()

  moved = eqx.apply_updates(mlp, gradients(mlp))
  before, after = map(trees.flatten, (mlp, moved))
  changed = {p for p in after if not np.array_equal(before[p], after[p])}
  assert "layers/1/weight/codebook" in changed
  assert not any(path.endswith("codes") for path in changed)


def test_equinox_cnn(monkeypatch, make_cnn):
  import equinox as eqx

  dense, images = make_cnn(KEY), IMAGES.transpose(0, 3, 1, 2)
  names, axes = _run("def apply(net", monkeypatch, net=dense, images=images)
  _check(names, lambda net, x: jax.vmap(net)(x), dense, axes, images)
  assert type(names["net"]) is type(dense)
  assert names["net"].activation is jax.nn.relu
  _trains_by_equinox(names["result"].variables.mlp)
  template = eqx.filter_eval_shape(make_cnn, KEY)
  loaded = pqf_jax.load("cnn.safetensors", template)
  network = inference.make_apply(
    lambda net, x: jax.vmap(net)(x), loaded, "layer"
  )
  got = network.apply_fn(network.variables, images)
  np.testing.assert_allclose(got, names["logits"], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(
    names["logits"],
    names["apply"](names["result"].variables, images),
    atol=1e-3,
  )

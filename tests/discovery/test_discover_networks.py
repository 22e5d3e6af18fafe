"""Discovery on networks: the authors' groups, and the layers of Flax."""

import functools
import json
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from pqf_jax.core import channels, trees
from pqf_jax.discovery import discover
from pqf_jax.models import resnet
from tests.models import quick

# A group that failed the self-check, or an unknown primitive, is a warning.
pytestmark = pytest.mark.filterwarnings("error::UserWarning")

Places = set[tuple[str, int]]
Net = Callable[..., Any]


def make_variables(module: nn.Module, *inputs: Any) -> Any:
  """Draws variables; compiling the initializers would take seconds."""
  return draw(jax.eval_shape(module.init, jax.random.key(0), *inputs))


def draw(shapes: Any) -> Any:
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: rng.uniform(-0.3, 0.7, leaf.shape).astype(leaf.dtype) ** 2,
    shapes,
  )


def list_groups(axes: channels.ChannelAxes) -> set[frozenset[Any]]:
  """Lists the axes of every group, whatever its name."""
  groups: dict[str, Places] = {}
  for path, row in axes.items():
    for dim, axis in enumerate(row):
      if axis is not None:
        assert (axis.outer, axis.inner) == (1, 1), path
        groups.setdefault(axis.group, set()).add((path, dim))
  return set(map(frozenset, groups.values()))


def as_places(
  parents: list[str], children: list[str], flat: trees.FlatTree
) -> frozenset[Any]:
  """Lists the axes of torch's names: outputs and inputs of modules."""
  outputs = {
    (path, leaf.ndim - 1)
    for path, leaf in flat.items()
    if re.sub(r"^\w+/|/\w+$", "", path).replace("/", ".") in parents
  }
  kernels = [f"params/{name.replace('.', '/')}/kernel" for name in children]
  return frozenset(outputs | {(path, flat[path].ndim - 2) for path in kernels})


def expected_resnet(depth: int, flat: trees.FlatTree) -> set[frozenset[Any]]:
  """Builds the groups of section 3.1 of the paper from the network's shape."""
  blocks = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}[depth]
  last = {18: 2, 50: 3}[depth]
  inside = [
    ([f"{block}.conv{i}", f"{block}.bn{i}"], [f"{block}.conv{i + 1}"])
    for stage, length in enumerate(blocks, start=1)
    for block in (f"layer{stage}.{j}" for j in range(length))
    for i in range(1, last)
  ]
  streams = [(["conv1", "bn1"], [])]
  for stage, length in enumerate(blocks, start=1):
    for j in range(length):
      block = f"layer{stage}.{j}"
      streams[-1][1].append(f"{block}.conv1")
      if f"params/{block.replace('.', '/')}/downsample/0/kernel" in flat:
        streams[-1][1].append(f"{block}.downsample.0")
        streams.append(([f"{block}.downsample.0", f"{block}.downsample.1"], []))
      streams[-1][0].extend([f"{block}.conv{last}", f"{block}.bn{last}"])
  streams[-1][1].append("fc")
  return {as_places(*group, flat) for group in inside + streams}


def test_finds_the_groups_of_the_paper_in_resnet_18():
  module = resnet.make(depth=18, num_classes=10, stem="small")
  images = jnp.zeros((1, 32, 32, 3))
  variables = make_variables(module, images)
  axes = discover.discover_channels(module.apply, variables, images)
  expected = expected_resnet(18, trees.flatten(variables))
  assert len(expected) == 12
  assert list_groups(axes) == expected
  assert list(channels.group_sizes(variables, axes))[:3] == [
    "conv1",
    "layer1/0/conv1",
    "layer1/1/conv1",
  ]


def test_finds_the_groups_of_the_paper_in_resnet_50():
  module = resnet.make(depth=50, num_classes=1000)
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  variables = jax.eval_shape(module.init, jax.random.key(0), images)
  axes = discover.infer_channels(module.apply, variables, images)
  expected = expected_resnet(50, trees.flatten(variables))
  assert len(expected) == 37
  assert list_groups(axes) == expected


@pytest.mark.parametrize(("depth", "count"), [(18, 12), (50, 37)])
def test_equals_the_published_list(shared_data, depth, count):
  text = (shared_data / "pqf_official/permutation_groups.json").read_text()
  published = json.loads(text)[f"resnet{depth}"]
  module = resnet.make(depth=depth, num_classes=10)
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  variables = jax.eval_shape(module.init, jax.random.key(0), images)
  flat = trees.flatten(variables)
  axes = discover.infer_channels(module.apply, variables, images)
  expected = {as_places(g["parents"], g["children"], flat) for g in published}
  assert len(expected) == count
  assert list_groups(axes) == expected == expected_resnet(depth, flat)


class ViT(nn.Module):
  """Two blocks of a vision transformer with a class token."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.Conv(24, (4, 4), (4, 4), name="patches")(x)
    x = x.reshape(len(x), -1, 24)
    token = self.param("token", nn.initializers.normal(), (1, 1, 24))
    x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, 24)), x], axis=1)
    x = x + self.param("positions", nn.initializers.normal(), (1, 5, 24))
    for i in range(2):
      y = nn.LayerNorm(name=f"norm{i}a")(x)
      x = x + nn.MultiHeadDotProductAttention(4, name=f"attention{i}")(y)
      y = nn.Dense(40, name=f"up{i}")(nn.LayerNorm(name=f"norm{i}b")(x))
      x = x + nn.Dense(24, name=f"down{i}")(nn.gelu(y))
    return nn.Dense(5, name="head")(nn.LayerNorm(name="norm")(x)[:, 0])


class MobileNet(nn.Module):
  """Inverted residuals: expand, depthwise, project (MobileNetV2)."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    norm = functools.partial(nn.BatchNorm, use_running_average=True)
    x = nn.relu6(norm(name="bn0")(nn.Conv(8, (3, 3), 2, name="stem")(x)))
    for i, features in enumerate((12, 12)):
      y = nn.Conv(6 * 8, (1, 1), use_bias=False, name=f"expand{i}")(x)
      y = nn.relu6(norm(name=f"bn{i}a")(y))
      y = nn.Conv(
        48, (3, 3), feature_group_count=48, use_bias=False, name=f"deep{i}"
      )(y)
      y = nn.relu6(norm(name=f"bn{i}b")(y))
      y = nn.Conv(features, (1, 1), use_bias=False, name=f"project{i}")(y)
      y = norm(name=f"bn{i}c")(y)
      x = x + y if x.shape == y.shape else y
    return nn.Dense(5, name="head")(x.mean((1, 2)))


class Upsampling(nn.Module):
  """Transposed convolutions of both conventions, as in a mask head."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.relu(nn.Conv(6, (3, 3), name="conv")(x))
    x = nn.relu(nn.ConvTranspose(8, (2, 2), (2, 2), name="up0")(x))
    flipped = nn.ConvTranspose(
      10, (3, 3), (2, 2), transpose_kernel=True, name="up1"
    )
    return nn.Conv(3, (1, 1), name="masks")(nn.relu(flipped(x)))


class Grouped(nn.Module):
  """Grouped convolution, group norm, flattened features, shuffled channels."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.relu(nn.Conv(20, (1, 1), name="conv0")(x))
    x = nn.relu(nn.Conv(12, (3, 3), feature_group_count=2, name="conv1")(x))
    x = nn.Conv(24, (1, 1), name="conv2")(x)
    x = nn.relu(nn.GroupNorm(2, name="norm")(x))
    b, h, w, _ = x.shape
    x = x.reshape(b, h, w, 2, 12).swapaxes(3, 4).reshape(b, h, w, 24)
    x = nn.Conv(7, (1, 1), name="conv3")(x)
    x = nn.max_pool(x, (2, 2), (2, 2)).reshape(b, -1)
    return nn.Dense(5, name="fc2")(nn.relu(nn.Dense(9, name="fc1")(x)))


class DenseNet(nn.Module):
  """Two dense blocks with a transition: each layer reads all before it."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    norm = functools.partial(nn.BatchNorm, use_running_average=True)
    x = nn.Conv(8, (3, 3), use_bias=False, name="stem")(x)
    for block in range(2):
      for i in range(2):
        y = nn.relu(norm(name=f"norm{block}{i}a")(x))
        y = nn.Conv(12, (1, 1), use_bias=False, name=f"narrow{block}{i}")(y)
        y = nn.relu(norm(name=f"norm{block}{i}b")(y))
        y = nn.Conv(4, (3, 3), use_bias=False, name=f"wide{block}{i}")(y)
        x = jnp.concatenate([x, y], axis=-1)
      x = nn.relu(norm(name=f"norm{block}")(x))
      if not block:
        x = nn.Conv(10, (1, 1), use_bias=False, name="transition")(x)
        x = nn.max_pool(x, (2, 2), (2, 2))
    return nn.Dense(5, name="head")(x.mean((1, 2)))


class UNet(nn.Module):
  """One level: the decoder reads what is upsampled beside the encoder's."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    norm = functools.partial(nn.GroupNorm, None, group_size=3)
    skip = nn.relu(norm(name="norm0")(nn.Conv(6, (3, 3), name="down0")(x)))
    x = nn.max_pool(skip, (2, 2), (2, 2))
    x = nn.relu(nn.Conv(8, (3, 3), name="down1")(x))
    x = nn.ConvTranspose(9, (2, 2), (2, 2), name="up")(x)
    x = norm(name="norm1")(jnp.concatenate([skip, x], axis=-1))
    x = nn.relu(nn.Conv(7, (3, 3), name="decode")(x))
    return nn.Conv(2, (1, 1), name="masks")(x)


class Inception(nn.Module):
  """Branches of different widths, one of which is pooled and not computed."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.relu(nn.Conv(6, (3, 3), name="stem")(x))
    y = nn.relu(nn.Conv(5, (1, 1), name="reduce")(x))
    branches = [
      nn.Conv(4, (1, 1), name="one")(x),
      nn.Conv(7, (3, 3), name="three")(y),
      nn.max_pool(x, (3, 3), padding="SAME"),
    ]
    x = nn.relu(jnp.concatenate(branches, axis=-1))
    x = nn.max_pool(x, (4, 4), (4, 4))
    x = nn.relu(nn.Dense(9, name="fc1")(x.reshape(len(x), -1)))
    return nn.Dense(5, name="fc2")(x)


class PaddedShortcut(nn.Module):
  """The shortcut of a wider block has channels of zeros on either side."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.relu(nn.Conv(6, (3, 3), name="stem")(x))
    y = nn.relu(nn.Conv(9, (3, 3), strides=2, name="first")(x))
    y = nn.Conv(12, (3, 3), name="second")(y)
    ends = [(0, 0)] * 3 + [(2, 4)]
    x = nn.relu(jnp.pad(x[:, ::2, ::2], ends) + y)
    return nn.Dense(5, name="head")(x.mean((1, 2)))


class FusedProjections(nn.Module):
  """Grouped queries, keys and values, then a gate, each of one kernel."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.Dense(12, name="stem")(x.reshape(len(x), -1, 3))
    x = nn.Dense((4 + 2 + 2) * 5, name="qkv")(x)
    q, k, v = jnp.split(x, [20, 30], axis=-1)
    q = q.reshape(*q.shape[:2], 2, 2, 5)
    k, v = (y.reshape(*y.shape[:2], 2, 5) for y in (k, v))
    weights = nn.softmax(jnp.einsum("bqkrd,bskd->bkrqs", q, k))
    x = jnp.einsum("bkrqs,bskd->bqkrd", weights, v).reshape(*x.shape[:2], -1)
    x = nn.Dense(14, name="both")(x)
    value, gate = jnp.split(x, 2, axis=-1)
    return nn.Dense(5, name="head")(value * nn.silu(gate))


class Recurrent(nn.Module):
  """Embedding, LSTM, layers stacked by `nn.scan`, and tied output weights."""

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    table = nn.Embed(11, 6, name="table")
    x = nn.RNN(nn.LSTMCell(10))(table(tokens))
    stack = nn.scan(
      nn.remat(Residual),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=3,
    )
    x, _ = stack(name="stack")(x, None)
    return table.attend(nn.Dense(6, name="out")(x))


class Residual(nn.Module):
  @nn.compact
  def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
    y = nn.tanh(nn.Dense(14, name="up")(x))
    return x + nn.Dense(x.shape[-1], name="down")(y), None


IMAGES = jnp.zeros((2, 8, 8, 3))
LINEN = [
  (
    ViT(),
    IMAGES,
    {"patches": 24}
    | {
      f"attention{i}/{name}": size
      for i in range(2)
      for name, size in (("query[1]", 4), ("query[2]", 6), ("value", 6))
    }
    | {"up0": 40, "up1": 40},
  ),
  (
    MobileNet(),
    IMAGES,
    {"stem": 8, "expand0": 48, "project0": 12, "expand1": 48},
  ),
  (Upsampling(), IMAGES, {"conv": 6, "up0": 8, "up1": 10}),
  (
    Grouped(),
    IMAGES,
    {"conv0": 10, "conv1": 6, "conv2": 12, "conv3": 7, "fc1": 9},
  ),
  (
    DenseNet(),
    IMAGES,
    {"stem": 8, "transition": 10}
    | {f"narrow{i}{j}": 12 for i in range(2) for j in range(2)}
    | {f"wide{i}{j}": 4 for i in range(2) for j in range(2)},
  ),
  (UNet(), IMAGES, {"down0": 3, "down1": 8, "decode": 7}),
  (
    Inception(),
    IMAGES,
    {"stem": 6, "reduce": 5, "one": 4, "three": 7, "fc1": 9},
  ),
  (
    PaddedShortcut(),
    IMAGES,
    {"stem": 6, "first": 9, "second[3, 0:2]": 2, "second[3, 8:12]": 4},
  ),
  (
    FusedProjections(),
    IMAGES,
    {"stem": 12, "qkv[1, 0:20]": 5, "qkv[1, 30:40]": 5, "both": 7},
  ),
  (
    Recurrent(),
    jnp.arange(12).reshape(2, 6) % 11,
    {"table": 6, "LSTMCell_0/ii": 10}
    | {f"stack/up, layer {i}": 14 for i in range(3)},
  ),
]


@pytest.mark.parametrize(
  ("module", "inputs", "sizes"),
  LINEN,
  ids=[type(module).__name__ for module, *_ in LINEN],
)
def test_finds_and_checks_the_groups_of_linen_networks(module, inputs, sizes):
  variables = make_variables(module, inputs)
  axes = discover.discover_channels(module.apply, variables, inputs)
  assert channels.group_sizes(variables, axes) == sizes


@pytest.mark.parametrize(
  "module", [DenseNet(), UNet(), Inception()], ids=lambda m: type(m).__name__
)
@jax.numpy_dtype_promotion("standard")
def test_random_orders_of_joined_channels_leave_the_outputs(module):
  images = np.random.default_rng(1).standard_normal(IMAGES.shape)
  variables = make_variables(module, IMAGES)
  axes = discover.infer_channels(module.apply, variables, IMAGES)
  sizes = channels.group_sizes(variables, axes)
  rng = np.random.default_rng(2)
  orders = {group: rng.permutation(size) for group, size in sizes.items()}
  forgotten = dict(list(axes.items())[:-1])
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    run = quick.jit(lambda v: module.apply(v, images))
    before, after, changed = (
      jax.device_get(run(channels.apply_permutations(wide, ties, drawn)))
      for ties, drawn in ((axes, {}), (axes, orders), (forgotten, orders))
    )
  assert before.dtype == np.float64
  np.testing.assert_allclose(after, before, rtol=1e-10)
  assert np.abs(changed / before - 1).max() > 1e-4


def test_joined_channels_have_segments_in_norms_and_kernels():
  variables = make_variables(DenseNet(), IMAGES)
  axes = discover.infer_channels(DenseNet().apply, variables, IMAGES)
  segments = tuple(
    channels.ChannelAxis(group, start=start, stop=stop)
    for group, start, stop in (
      ("stem", 0, 8),
      ("wide00", 8, 12),
      ("wide01", 12, 16),
    )
  )
  narrow = channels.ChannelAxis("narrow01")
  read = axes["params/narrow01/kernel"]
  assert read == (None, None, segments[:2], narrow)
  assert axes["params/norm0/scale"] == (segments,)
  assert axes["batch_stats/norm0/var"] == (segments,)
  transition = channels.ChannelAxis("transition")
  assert axes["params/transition/kernel"] == (None, None, segments, transition)


def test_flattened_segments_repeat_at_every_position():
  variables = make_variables(Inception(), IMAGES)
  axes = discover.infer_channels(Inception().apply, variables, IMAGES)
  widths = {"one": 4, "three": 7, "stem": 6}
  expected, start = [], 0
  for group in 4 * list(widths):
    stop = start + widths[group]
    expected.append(channels.ChannelAxis(group, start=start, stop=stop))
    start = stop
  assert axes["params/fc1/kernel"][0] == tuple(expected)


def test_heads_and_their_channels_are_permuted_apart():
  variables = make_variables(ViT(), IMAGES)
  axes = discover.infer_channels(ViT().apply, variables, IMAGES)
  heads, queries, values = (
    channels.ChannelAxis(f"attention0/{name}")
    for name in ("query[1]", "query[2]", "value")
  )
  stream = channels.ChannelAxis("patches")
  for name, last in (("query", queries), ("key", queries), ("value", values)):
    layer = f"params/attention0/{name}"
    assert axes[f"{layer}/kernel"] == (stream, heads, last)
    assert axes[f"{layer}/bias"] == (heads, last)
  assert axes["params/attention0/out/kernel"] == (heads, values, stream)
  assert axes["params/positions"] == (None, None, stream)


def test_transposed_convolutions_have_their_axes_the_right_way_round():
  variables = make_variables(Upsampling(), IMAGES)
  axes = discover.infer_channels(Upsampling().apply, variables, IMAGES)
  assert [axis and axis.group for axis in axes["params/up0/kernel"]] == [
    None,
    None,
    "conv",
    "up0",
  ]
  assert [axis and axis.group for axis in axes["params/up1/kernel"]] == [
    None,
    None,
    "up1",
    "up0",
  ]


class NnxNetwork(nnx.Module):
  """A convolution with batch norm, then attention over the positions."""

  def __init__(self, rngs: nnx.Rngs):
    self.conv = nnx.Conv(3, 16, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(16, use_running_average=True, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(
      2, 16, decode=False, deterministic=True, rngs=rngs
    )
    self.head = nnx.Linear(16, 7, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = nnx.relu(self.norm(self.conv(x))).reshape(len(x), -1, 16)
    return self.head((x + self.attention(x)).mean(1))


def test_finds_and_checks_the_groups_of_an_nnx_network():
  network = nnx.eval_shape(lambda: NnxNetwork(nnx.Rngs(0)))
  graph, state = nnx.split(network)

  def run(variables: Any, x: jax.Array) -> jax.Array:
    return nnx.merge(graph, nnx.State(variables))(x)

  variables = draw(nnx.to_pure_dict(state))
  axes = discover.discover_channels(run, variables, IMAGES)
  assert channels.group_sizes(variables, axes) == {
    "conv": 16,
    "attention/query[1]": 2,
    "attention/query[2]": 8,
    "attention/value": 8,
  }

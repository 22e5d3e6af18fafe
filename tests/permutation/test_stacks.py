"""Permutation of layers that a loop runs, and of heads."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from pqf_jax import permute
from pqf_jax.core import channels
from pqf_jax.core import plan as plans
from pqf_jax.discovery import discover, kernels
from pqf_jax.models import decoder, pre_norm

SHAPES = {
  "stem": (6, 8),
  "up": (3, 8, 16),
  "down": (3, 16, 8),
  "head": (8, 4),
}


def draw(shapes):
  rng = np.random.default_rng(0)
  return {
    name: rng.normal(size=shape).astype(np.float32)
    for name, shape in shapes.items()
  }


def permuted(apply_fn, variables, x):
  found = kernels.find_kernels(apply_fn, variables, x)
  plan = plans.make_plan([plans.Rule(".*", 4, 2)], variables, found)
  axes = discover.discover_channels(apply_fn, variables, x)
  return permute.permute_channels(jax.random.key(0), variables, axes, plan)


def residual(p, x):
  def layer(h, kernels):
    up, down = kernels
    return h + jnp.tanh(h @ up) @ down, None

  return lax.scan(layer, x @ p["stem"], (p["up"], p["down"]))[0] @ p["head"]


def residual_in_numpy(p, x):
  p = {name: np.asarray(leaf, np.float64) for name, leaf in p.items()}
  h = x @ p["stem"]
  for up, down in zip(p["up"], p["down"], strict=True):
    h = h + np.tanh(h @ up) @ down
  return h @ p["head"]


def mean_log_det(kernel):
  """Returns that of [inputs, outputs], whose sub-vectors have 2 channels."""
  vectors = np.asarray(kernel, np.float64).T.reshape(-1, 2)
  return np.linalg.slogdet(np.cov(vectors.T))[1]


def test_layers_of_a_loop_have_one_stream_and_their_own_hidden_channels():
  variables, x = draw(SHAPES), np.ones((2, 6), np.float32)
  after, orders, reports = permuted(residual, variables, x)
  stream, *hidden = reports
  assert (stream.size, set(stream.consumers)) == (8, {"up", "head"})
  assert [r.group for r in hidden] == [f"up, layer {i}" for i in range(3)]
  np.testing.assert_allclose(
    residual_in_numpy(after, x), residual_in_numpy(variables, x), rtol=1e-10
  )
  for i, report in enumerate(hidden):
    assert (report.size, report.consumers) == (16, ("down",))
    assert report.accepted and report.log_det_after < report.log_det_before
    for value, tree in (
      (report.log_det_before, variables),
      (report.log_det_after, after),
    ):
      np.testing.assert_allclose(value, mean_log_det(tree["down"][i]))
    order = orders[report.group]
    stream_order = orders[stream.group]
    np.testing.assert_array_equal(
      after["down"][i], variables["down"][i][order][:, stream_order]
    )
  assert len({tuple(orders[report.group]) for report in hidden}) == 3


def test_own_orders_are_better_than_one_for_all_layers():
  shapes = {"stem": (6, 32), "up": (3, 32, 16), "down": (3, 16, 32)}
  variables = draw({**shapes, "head": (32, 4)})
  x = np.ones((2, 6), np.float32)
  rng = np.random.default_rng(1)
  # The channels of each layer are alike in pairs, which differ by layer.
  for down in variables["down"]:
    pairs = rng.permutation(16)
    down[pairs[:8]] += 2 * down[pairs[8:]]
  found = kernels.find_kernels(residual, variables, x)
  rules = [plans.Rule("down", 4, 2), plans.Rule(".*", None)]
  plan = plans.make_plan(rules, variables, found)
  own = discover.infer_channels(residual, variables, x)
  shared = {
    path: tuple(axis and axis._replace(stacked=()) for axis in row)
    for path, row in own.items()
  }
  lost = {}
  for name, axes in (("own", own), ("shared", shared), ("none", {})):
    after, *_ = permute.permute_channels(
      jax.random.key(0), variables, axes, plan
    )
    np.testing.assert_allclose(
      residual_in_numpy(after, x), residual_in_numpy(variables, x), rtol=1e-10
    )
    lost[name] = [mean_log_det(down) for down in after["down"]]
  # One order can serve one of the layers only.
  assert (np.array(lost["own"]) < np.array(lost["shared"]) + 1e-3).all()
  assert np.mean(lost["own"]) < np.mean(lost["shared"]) - 1
  assert np.mean(lost["shared"]) < np.mean(lost["none"])


class ScannedDecoder(nn.Module):
  """The network of `models.decoder`, whose blocks are a stack."""

  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(11, 16, name="tokens")(tokens)
    x = x + nn.Embed(5, 16, name="places")(jnp.arange(tokens.shape[1]))[None]
    x, _ = nn.scan(
      lambda block, x, _: (block(x), None),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=3,
    )(pre_norm.Block(2, 64, True, name="blocks"), x, None)
    return nn.Dense(11, name="head")(nn.LayerNorm(name="norm")(x))


def test_a_scanned_decoder_is_its_layers_apart_in_float64():
  tokens = np.arange(10).reshape(2, 5)
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(ScannedDecoder().init, jax.random.key(0), tokens)
  variables = jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes
  )
  after, orders, _ = permuted(ScannedDecoder().apply, variables, tokens)
  assert orders.keys() >= {
    f"blocks/{name}, layer {i}"
    for name in ("up", "attention/value")
    for i in range(3)
  }

  @jax.jit
  def run_apart(variables):
    network = decoder.make(
      vocabulary=11, positions=5, features=16, heads=2, depth=3
    )
    params = dict(variables["params"])
    stack = params.pop("blocks")
    for i in range(3):
      params[f"block{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], stack)
    return network.apply({"params": params}, tokens)

  with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
    expected, got = (
      run_apart(jax.tree.map(lambda x: np.asarray(x, np.float64), tree))
      for tree in (variables, after)
    )
  assert got.dtype == np.float64
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10)


def convolve(x, kernel):
  layout = ("NHWC", "HWIO", "NHWC")
  return lax.conv_general_dilated(
    x, kernel[...], (1, 1), "SAME", dimension_numbers=layout
  )


def ensemble(p, x):
  return jax.vmap(lambda up, down: convolve(jnp.tanh(convolve(x, up)), down))(
    p["up"], p["down"]
  )


def test_convolutions_under_vmap_have_groups():
  variables = draw({"up": (2, 3, 3, 3, 8), "down": (2, 3, 3, 8, 4)})
  x = np.random.default_rng(1).normal(size=(1, 5, 5, 3)).astype(np.float32)
  axes = discover.infer_channels(ensemble, variables, x)
  assert {
    path: [d for d, a in enumerate(row) if a] for path, row in axes.items()
  } == {
    "up": [4],
    "down": [3],
  }
  order = {axes["up"][4].group: np.arange(8)[::-1]}
  after = channels.apply_permutations(variables, axes, order)
  np.testing.assert_allclose(
    ensemble(after, x), ensemble(variables, x), atol=1e-4
  )


def attention(p, x):
  q, k, v = (jnp.einsum("td,dhc->thc", x, p[name]) for name in "qkv")
  weights = jax.nn.softmax(jnp.einsum("qhc,khc->hqk", q, k))
  return jnp.einsum("hqk,khc,hcd->qd", weights, v, p["out"])


def test_channels_of_a_head_are_ordered_alike_in_all_heads():
  shapes = dict.fromkeys("qkv", (6, 2, 8)) | {"out": (2, 8, 6)}
  variables, x = draw(shapes), np.eye(6, dtype=np.float32)
  after, _, reports = permuted(attention, variables, x)
  (report,) = [report for report in reports if report.consumers]
  assert (report.size, report.consumers) == (8, ("out",))
  assert report.log_det_after < report.log_det_before
  # Products of values and outputs, summed over heads and their channels.
  before, now = (
    np.einsum(
      "dhc,hce->dhe", p["v"].astype(np.float64), p["out"].astype(np.float64)
    )
    for p in (variables, jax.device_get(after))
  )
  np.testing.assert_allclose(
    np.sort(now.sum(1), axis=None), np.sort(before.sum(1), axis=None), rtol=1e-9
  )

"""Permutation of layers that a loop runs, and of heads."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pqf_jax import permute
from pqf_jax.core import channels
from pqf_jax.core import plan as plans
from pqf_jax.discovery import discover, kernels

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


def test_layers_of_a_loop_share_the_orders_of_their_groups():
  variables, x = draw(SHAPES), np.ones((2, 6), np.float32)
  after, orders, reports = permuted(residual, variables, x)
  assert {report.size: set(report.consumers) for report in reports} == {
    8: {"up", "head"},  # of the residual stream
    16: {"down"},
  }
  assert orders
  np.testing.assert_allclose(
    residual_in_numpy(after, x), residual_in_numpy(variables, x), rtol=1e-10
  )
  for report in reports:
    assert report.log_det_after <= report.log_det_before


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

"""Discovery on small programs, against a search of all permutations."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pqf_jax import errors
from pqf_jax.core import channels
from pqf_jax.discovery import discover, rules
from tests.models import quick

pytestmark = pytest.mark.filterwarnings("error::UserWarning")

Params = dict[str, np.ndarray]


def draw(**shapes: tuple[int, ...]) -> Params:
  rng = np.random.default_rng(0)
  return {
    name: rng.standard_normal(shape).astype(np.float32)
    for name, shape in shapes.items()
  }


def convolve(x: jax.Array, kernel: jax.Array, **settings: Any) -> jax.Array:
  layout = ("NHWC", "HWIO", "NHWC")
  return lax.conv_general_dilated(
    x, kernel, (1, 1), "VALID", dimension_numbers=layout, **settings
  )


def residual(p: Params, x: jax.Array) -> jax.Array:
  x = x @ p["stem"]
  x = x + jnp.tanh(x @ p["up"] + p["bias"][None]) @ p["down"]
  return x * p["scale"][None] @ p["head"]


def attention(p: Params, x: jax.Array) -> jax.Array:
  q, k, v = (jnp.einsum("td,dhc->thc", x, p[name]) for name in "qkv")
  weights = jax.nn.softmax(jnp.einsum("qhc,khc->hqk", q, k))
  return jnp.einsum("hqk,khc,hcd->qd", weights, v, p["out"])


def flatten(p: Params, x: jax.Array) -> jax.Array:
  x = jnp.tanh(convolve(x[None, :, None], p["conv"]))
  return jnp.tanh(x.reshape(1, -1) @ p["fc1"]) @ p["fc2"]


def depthwise(p: Params, x: jax.Array) -> jax.Array:
  x = jnp.tanh(convolve(x[None, :, None], p["expand"]))
  x = jnp.tanh(convolve(x, p["space"], feature_group_count=2))
  return convolve(x, p["project"])


def recurrent(p: Params, x: jax.Array) -> jax.Array:
  def step(h: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array]:
    h = jnp.tanh(token @ p["input"] + h @ p["hidden"] + p["bias"])
    return h, h @ p["output"]

  return lax.scan(step, jnp.zeros(2, x.dtype), x)[1]


def gated(p: Params, x: jax.Array) -> jax.Array:
  x = x @ p["both"] + p["bias"][None]
  value, gate = jnp.split(x, 2, axis=-1)
  return value * jax.nn.sigmoid(gate) @ p["out"]


def sliced(p: Params, x: jax.Array) -> jax.Array:
  x = x @ p["both"] + p["bias"][None]
  return x[:, :2] * jax.nn.sigmoid(x[:, 2:]) @ p["out"]


def interleaved(p: Params, x: jax.Array) -> jax.Array:
  x = x @ p["both"] + p["bias"][None]
  return x[:, ::2] * jax.nn.sigmoid(x[:, 1::2]) @ p["out"]


def joined(p: Params, x: jax.Array) -> jax.Array:
  x = x @ p["stem"]
  x = jnp.concatenate([x, jnp.tanh(x @ p["new"])], axis=-1)
  return x * p["scale"][None] @ p["out"]


def densely_joined(p: Params, x: jax.Array) -> jax.Array:
  x = x @ p["stem"]
  for new in ("new0", "new1"):
    x = jnp.concatenate([x, jnp.tanh(x @ p[new])], axis=-1)
  return jnp.tanh(x) @ p["out"]


def branches(p: Params, x: jax.Array) -> jax.Array:
  """Three branches; the last is padded, not computed."""
  x = jnp.concatenate([x @ p["one"], jnp.sin(x @ p["two"])], axis=-1)
  return jnp.tanh(jnp.pad(x, ((0, 0), (0, 1))) * p["scale"][None]) @ p["out"]


def joined_and_split(p: Params, x: jax.Array) -> jax.Array:
  x = jnp.concatenate([x @ p["one"], x @ p["two"]], axis=-1)
  first, second = jnp.split(jnp.tanh(x + p["bias"][None]), [2], axis=-1)
  return first @ p["first"] + second.sum(-1, keepdims=True)


def fused(p: Params, x: jax.Array) -> jax.Array:
  """Parts of a projection that nobody joins: of 2 and 3 channels."""
  x = x @ p["both"]
  return jnp.tanh(x[:, :2]) @ p["first"] + jnp.sin(x[:, 2:]) @ p["second"]


def crosswise(p: Params, x: jax.Array) -> jax.Array:
  """Halves that are added crosswise have one order."""
  one, two = x @ p["one"], jnp.tanh(x @ p["two"])
  x = jnp.concatenate([one, two], -1) + jnp.sin(jnp.concatenate([two, one], -1))
  return jnp.tanh(x) @ p["out"]


def unequal_crosswise(p: Params, x: jax.Array) -> jax.Array:
  """Parts of 1 and 2 channels added crosswise fix each other."""
  one, two = x @ p["one"], jnp.tanh(x @ p["two"])
  x = jnp.concatenate([one, two], -1) + jnp.sin(jnp.concatenate([two, one], -1))
  return jnp.tanh(x @ p["mix"]) @ p["out"]


def flattened(p: Params, x: jax.Array) -> jax.Array:
  """Two positions of joined channels, flattened: all segments repeat."""
  x = jnp.concatenate([x @ p["one"], jnp.tanh(x @ p["two"])], axis=-1)
  return jnp.tanh(x[:2].reshape(1, -1)) @ p["out"]


def grouped(p: Params, x: jax.Array) -> jax.Array:
  """Groups of two channels, which are normalized, make up either part."""
  x = jnp.concatenate([x @ p["one"], jnp.tanh(x @ p["two"])], axis=-1)
  x = x.reshape(len(x), 2, 2)
  x = x / (1 + x.var(-1, keepdims=True))
  return jnp.tanh(x.reshape(len(x), 4)) @ p["out"]


def embedded(p: Params, x: jax.Array) -> jax.Array:
  tokens = (x[:, 0] > 0).astype(jnp.int32)
  x = jnp.take(p["table"], tokens, axis=0) @ p["mix"] + p["bias"][None]
  return x @ p["table"].T


def branching(p: Params, x: jax.Array) -> jax.Array:
  x = x @ p["stem"]
  yes, no, loop = (p[name][None] for name in ("yes", "no", "loop"))
  x = lax.cond(x.sum() > 0, lambda y: y * yes, lambda y: y - no, x)
  x = lax.fori_loop(0, 3, lambda _, y: jnp.tanh(y * loop), x)
  small = jnp.tanh(p["while"])[None]
  # The two values change places, so that only the loop itself ties them.
  x, _ = lax.while_loop(
    lambda pair: jnp.abs(pair[0]).sum() > 0.1,
    lambda pair: (pair[1] * small, pair[0] / 2),
    (x, jnp.ones_like(x)),
  )
  return jax.checkpoint(jnp.sin)(x) @ p["out"]


PROGRAMS = {
  residual: draw(
    stem=(2, 2), up=(2, 2), bias=(2,), down=(2, 2), scale=(2,), head=(2, 2)
  ),
  attention: draw(q=(2, 2, 2), k=(2, 2, 2), v=(2, 2, 2), out=(2, 2, 2)),
  flatten: draw(conv=(1, 1, 2, 2), fc1=(6, 2), fc2=(2, 2)),
  depthwise: draw(
    expand=(1, 1, 2, 2), space=(2, 1, 1, 2), project=(1, 1, 2, 2)
  ),
  recurrent: draw(input=(2, 2), hidden=(2, 2), bias=(2,), output=(2, 2)),
  gated: draw(both=(2, 4), bias=(4,), out=(2, 2)),
  sliced: draw(both=(2, 4), bias=(4,), out=(2, 2)),
  interleaved: draw(both=(2, 4), bias=(4,), out=(2, 2)),
  joined: draw(stem=(2, 2), new=(2, 2), scale=(4,), out=(4, 2)),
  densely_joined: draw(stem=(2, 2), new0=(2, 1), new1=(3, 2), out=(5, 2)),
  branches: draw(one=(2, 1), two=(2, 2), scale=(4,), out=(4, 2)),
  joined_and_split: draw(one=(2, 2), two=(2, 1), bias=(3,), first=(2, 2)),
  fused: draw(both=(2, 5), first=(2, 1), second=(3, 1)),
  crosswise: draw(one=(2, 2), two=(2, 2), out=(4, 2)),
  unequal_crosswise: draw(one=(2, 1), two=(2, 2), mix=(3, 2), out=(2, 1)),
  flattened: draw(one=(2, 1), two=(2, 2), out=(6, 2)),
  embedded: draw(table=(2, 2), mix=(2, 2), bias=(2,)),
  branching: draw(
    stem=(2, 2), yes=(2,), no=(2,), loop=(2,), out=(2, 2), **{"while": (2,)}
  ),
}
INPUT = draw(x=(3, 2))["x"]


Orders = tuple[tuple[int, ...], ...]
"""An order of every axis of every parameter."""


def preserved_orders(
  program: Callable[..., Any], params: Params
) -> set[Orders]:
  """All orders that leave the function as it is, by trying each."""
  axes = [
    (name, dim, list(itertools.permutations(range(length))))
    for name, array in params.items()
    for dim, length in enumerate(array.shape)
  ]

  def run(chosen: jax.Array) -> jax.Array:
    permuted = dict(params)
    for index, (name, dim, orders) in zip(chosen, axes, strict=True):
      order = jnp.asarray(orders)[index]
      permuted[name] = jnp.take(permuted[name], order, axis=dim)
    # Two inputs, so that both branches are taken.
    return jnp.stack([program(permuted, INPUT), program(permuted, -INPUT)])

  counts = [range(len(orders)) for *_, orders in axes]
  every = np.array(list(itertools.product(*counts)))
  outputs = np.asarray(quick.jit(jax.vmap(run))(every))
  error = np.abs(outputs - outputs[:1]).reshape(len(every), -1).max(1)
  assert not np.any((error > 1e-5) & (error < 1e-4)), "no clear margin"
  return {
    tuple(orders[index] for index, (*_, orders) in zip(row, axes, strict=True))
    for row in every[error < 1e-5]
  }


def spanned_orders(params: Params, axes: channels.ChannelAxes) -> set[Orders]:
  """All orders that permuting whole groups can make."""
  sizes = channels.group_sizes(params, axes)

  def order(name: str, dim: int, drawn: dict[str, Any]) -> tuple[int, ...]:
    entries = np.arange(params[name].shape[dim])
    carried = axes[name][dim] if name in axes else None
    for axis in channels.segments(carried):
      part = entries[axis.start : axis.stop]
      split = part.reshape(axis.outer, -1, axis.inner)
      part[:] = split[:, drawn[axis.group]].reshape(-1)
    return tuple(entries.tolist())

  choices = [itertools.permutations(range(size)) for size in sizes.values()]
  return {
    tuple(
      order(name, dim, dict(zip(sizes, chosen, strict=True)))
      for name, array in params.items()
      for dim in range(array.ndim)
    )
    for chosen in itertools.product(*choices)
  }


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_finds_exactly_the_orders_that_preserve_the_function(program):
  params = PROGRAMS[program]
  axes = discover.discover_channels(program, params, INPUT)
  assert axes
  assert spanned_orders(params, axes) == preserved_orders(program, params)


def test_groups_of_channels_share_an_order_if_they_fit_the_parts():
  params = draw(one=(2, 2), two=(2, 2), out=(4, 2))
  axes = discover.discover_channels(grouped, params, INPUT)
  assert channels.group_sizes(params, axes) == {"one": 2}
  # Each group could have an order of its own; axes as products cannot say so.
  found = spanned_orders(params, axes)
  assert found < preserved_orders(grouped, params)


def test_groups_that_reach_over_both_parts_keep_their_order_with_a_warning():
  params = draw(one=(2, 1), two=(2, 3), out=(4, 2))
  with pytest.warns(UserWarning, match=r"do not fit.*: two\[1\], out\[0\]$"):
    axes = discover.discover_channels(grouped, params, INPUT)
  assert not axes


def test_shapes_suffice_to_infer():
  params = jax.eval_shape(lambda: PROGRAMS[residual])
  inputs = jax.eval_shape(lambda: INPUT)
  axes = discover.infer_channels(residual, params, inputs)
  assert axes == discover.infer_channels(residual, PROGRAMS[residual], INPUT)
  assert list(channels.group_sizes(params, axes)) == ["stem", "up"]


def test_groups_come_in_the_order_of_the_network_and_are_named_by_it():
  params = draw(z=(3, 4), a=(4, 5), unused=(4, 5), out=(5, 2))
  variables = {"params": {name: {"kernel": params[name]} for name in params}}

  def run(variables: Any, x: jax.Array) -> jax.Array:
    p = variables["params"]
    for name in ("z", "a", "out"):
      x = jnp.tanh(x @ p[name]["kernel"])
    return x

  axes = discover.discover_channels(run, variables, jnp.ones((2, 3)))
  assert channels.group_sizes(variables, axes) == {"z": 4, "a": 5}
  assert list(axes) == [f"params/{name}/kernel" for name in ("z", "a", "out")]


def test_a_slice_of_which_only_the_shape_is_read_cuts_nothing():
  params = draw(a=(2, 5), out=(5, 2))

  def run(p: Params, x: jax.Array) -> jax.Array:
    x = jnp.tanh(x @ p["a"])
    # As `nn.make_causal_mask(x[..., 0])`.
    return x @ p["out"] + jnp.ones_like(x[..., 0])[:, None]

  axes = discover.discover_channels(run, params, INPUT)
  assert channels.group_sizes(params, axes) == {"a": 5}


def test_names_stay_different():
  params = draw(first=(3, 4), second=(4, 5), third=(5, 2))

  def run(variables: Any, x: jax.Array) -> jax.Array:
    p = variables["mlp"]
    return jnp.tanh(jnp.tanh(x @ p["first"]) @ p["second"]) @ p["third"]

  axes = discover.discover_channels(run, {"mlp": params}, jnp.ones((2, 3)))
  sizes = channels.group_sizes({"mlp": params}, axes)
  assert sizes == {"mlp/first[1]": 4, "mlp/second[1]": 5}


def test_repeated_channels_may_be_permuted_among_each_other():
  params = draw(first=(3, 4), second=(8, 5), scale=(8,), third=(5, 2))

  def run(p: Params, x: jax.Array) -> jax.Array:
    x = jnp.tile(jnp.cumsum(x @ p["first"], -1), (1, 2)) * p["scale"][None]
    return jnp.tanh(x @ p["second"]) @ p["third"]

  axes = discover.discover_channels(run, params, jnp.ones((2, 3)))
  assert channels.group_sizes(params, axes) == {"second[0]": 2, "second[1]": 5}
  assert axes["scale"] == (channels.ChannelAxis("second[0]", 1, 4),)


def test_of_two_groups_on_one_axis_the_larger_is_kept():
  params = draw(conv=(3, 32), out=(32, 2))

  def run(p: Params, x: jax.Array) -> jax.Array:
    x = (x @ p["conv"]).reshape(2, 4, 8)
    x = x / (1 + x.var(-1, keepdims=True))
    return x.reshape(2, 32) @ p["out"]

  axes = discover.discover_channels(run, params, jnp.ones((2, 3)))
  assert axes == {
    "conv": (None, channels.ChannelAxis("conv", 4)),
    "out": (channels.ChannelAxis("conv", 4), None),
  }


def test_products_of_all_pairs_of_channels_are_left_alone():
  params = draw(first=(3, 4), pairs=(16, 5), third=(5, 2))

  def run(p: Params, x: jax.Array) -> jax.Array:
    x = jnp.tanh(x @ p["first"])
    x = (x[:, :, None] * x[:, None, :]).reshape(2, 16)
    return jnp.tanh(x @ p["pairs"]) @ p["third"]

  axes = discover.discover_channels(run, params, jnp.ones((2, 3)))
  assert channels.group_sizes(params, axes) == {"pairs": 5}


ONES = np.ones((2, 1, 1, 1), np.float32)
MIXES = {
  "cumsum": lambda x: jnp.cumsum(x, -1),
  "sort": lambda x: jnp.sort(x, -1),
  "flip": lambda x: jnp.flip(x, -1),
  "iota": lambda x: x * jnp.arange(4.0)[None],
  "constant": lambda x: x * np.array([[1, 2, 3, 4]], np.float32),
  "argmax": lambda x: jax.nn.one_hot(x.argmax(-1), 4),
  "take": lambda x: jnp.take(x, np.array([0, 2, 1, 3]), axis=-1),
  "dynamic": lambda x: lax.dynamic_slice_in_dim(x, 1, 1, axis=1) + x,
  "update": lambda x: lax.dynamic_update_slice_in_dim(x, x[:, :2] * 2, 1, 1),
  "top_k": lambda x: lax.top_k(x, 4)[0],
  "window": lambda x: lax.reduce_window(
    x, 0.0, lax.add, (1, 3), (1, 1), ((0, 0), (1, 1))
  ),
  "convolution": lambda x: jnp.concatenate(
    [convolve(x[..., None, None], ONES)[..., 0, 0], np.ones((2, 1), "f")], 1
  ),
  "scan": lambda x: (
    lax.scan(lambda carry, y: (carry + y, carry * y), jnp.zeros(2), x.T)[1].T
  ),
  "dilate": lambda x: lax.pad(x, 0.0, [(0, 0, 0), (0, 0, 1)])[:, :4],
  "parts": lambda x: jnp.concatenate(
    [x[:, i : i + 1] for i in (3, 2, 0, 1)], -1
  ),
  "stack": lambda x: jnp.stack([x[:, 0], *x.T[1:]], -1),
}


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_what_depends_on_the_order_is_left_alone(mix):
  params = draw(
    first=(3, 4), bias=(4,), scale=(4,), second=(4, 5), third=(5, 2)
  )

  def run(p: Params, x: jax.Array) -> jax.Array:
    # The bias and the scale tie axes on either side of the mix, so that both
    # would make a group if they were not blocked.
    x = mix(x @ p["first"] + p["bias"][None]) * p["scale"][None]
    return jnp.tanh(x @ p["second"]) @ p["third"]

  axes = discover.infer_channels(run, params, jnp.ones((2, 3)))
  assert channels.group_sizes(params, axes) == {"second": 5}


def test_kernels_that_are_left_out_for_a_cut_are_named():
  params = draw(first=(3, 4), bias=(4,), second=(2, 5), third=(5, 2))

  def run(p: Params, x: jax.Array) -> jax.Array:
    x = (x @ p["first"] + p["bias"][None])[:, ::3]
    return jnp.tanh(x @ p["second"]) @ p["third"]

  with pytest.warns(UserWarning, match=r"slice.*: first\[1\], second\[0\]$"):
    axes = discover.discover_channels(run, params, jnp.ones((2, 3)))
  assert channels.group_sizes(params, axes) == {"second": 5}


def test_segments_have_names_of_their_own():
  params = draw(both=(3, 7), bias=(7,), first=(4, 2), second=(3, 2))

  def run(p: Params, x: jax.Array) -> jax.Array:
    x = jnp.tanh(x @ p["both"] + p["bias"][None])
    return x[:, :4] @ p["first"] + x[:, 4:] @ p["second"]

  axes = discover.discover_channels(run, params, jnp.ones((2, 3)))
  names = "both[1, 0:4]", "both[1, 4:7]"
  segments = tuple(
    channels.ChannelAxis(name, start=start, stop=stop)
    for name, start, stop in zip(names, (0, 4), (4, 7), strict=True)
  )
  assert axes["both"] == (None, segments)
  assert axes["first"] == (channels.ChannelAxis(names[0]), None)
  assert axes["second"] == (channels.ChannelAxis(names[1]), None)


def test_unknown_primitives_block_what_they_touch_and_are_reported():
  params = draw(first=(3, 4), second=(4, 5), third=(5, 2))

  def run(p: Params, x: jax.Array) -> jax.Array:
    x = jnp.fft.fft(x @ p["first"]).real
    return jnp.tanh(x @ p["second"]) @ p["third"]

  with pytest.warns(UserWarning, match=r"\['fft'\]: first\[1\], second\[0\]$"):
    axes = discover.discover_channels(run, params, jnp.ones((2, 3)))
  assert channels.group_sizes(params, axes) == {"second": 5}


def test_a_wrong_rule_is_caught_and_its_groups_are_named(monkeypatch):
  params = draw(first=(3, 4), second=(4, 5), third=(5, 2))
  monkeypatch.setitem(rules.RULES, "cumsum", rules.RULES["sin"])

  def run(p: Params, x: jax.Array) -> jax.Array:
    x = jnp.cumsum(x @ p["first"], -1)
    return jnp.tanh(x @ p["second"]) @ p["third"]

  with pytest.warns(UserWarning, match=r"groups \['first'\] changes"):
    axes = discover.discover_channels(run, params, jnp.ones((2, 3)))
  assert channels.group_sizes(params, axes) == {"second": 5}


def test_a_function_that_cannot_be_traced_is_refused():
  def run(p: Params, x: jax.Array, train: bool) -> jax.Array:
    return x @ p["first"] if train else x

  message = "cannot be traced by JAX: TracerBoolConversionError: .*train=False"
  with pytest.raises(errors.InputError, match=message):
    discover.discover_channels(run, draw(first=(3, 4)), jnp.ones((2, 3)), True)


def test_variables_that_are_outputs_too_keep_their_order():
  params = draw(first=(3, 4), second=(4, 2))

  def run(p: Params, x: jax.Array) -> Any:
    return x @ p["first"] @ p["second"], p["first"] * 0.9

  assert not discover.discover_channels(run, params, jnp.ones((2, 3)))

"""Which groups of a loop's layers have an order of their own in every layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

from pqf_jax.core import channels
from pqf_jax.discovery import discover
from tests.discovery import test_discover as programs

pytestmark = pytest.mark.filterwarnings("error::UserWarning")

X = np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)
SHAPES = {"up": (4, 4, 5), "down": (4, 5, 4), "bias": (4, 5)}


def layer(h, p):
  return h + jnp.tanh(h @ p["up"] + p["bias"][None]) @ p["down"]


def run(p, x, **loop):
  return lax.scan(lambda h, p: (layer(h, p), None), x, p, **loop)[0]


def moved(p, change):
  return {**p, "up": change(p["up"])}


def residual(p, x):
  return run(p, x)


def backwards(p, x):
  return run(p, x, reverse=True)


def cast(p, x):
  return run(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), p), x)


def scaled(p, x):
  """A norm over all but the layers, outside of the loop."""
  norm = jnp.sqrt(jnp.sum(p["up"] ** 2, axis=(1, 2), keepdims=True))
  return run(moved(p, lambda up: up / norm), x)


def recomputed(p, x):
  step = jax.checkpoint(jax.jit(lambda h, p: (layer(h, p), None)))
  return lax.scan(step, x, p)[0]


def chosen(p, x):
  """Layers whose number decides, with a loop of their own."""

  def step(h, row):
    number, p = row
    h = lax.cond(number > 1, lambda h: layer(h, p), lambda h: h, h)
    y = jnp.tanh(h @ p["up"])
    y = lax.fori_loop(0, 2, lambda _, y: jnp.sin(y + p["bias"][None]), y)
    return h + y @ p["down"], None

  return lax.scan(step, x, (jnp.arange(4), p))[0]


def reported(p, x):
  """Each layer gives its hidden channels, whose norm is all that is used."""

  def step(h, p):
    y = jnp.tanh(h @ p["up"])
    return h + y @ p["down"], y * p["bias"][None]

  h, hidden = lax.scan(step, x, p)
  return h, jnp.square(hidden).sum(-1)


def skipped(p, x):
  """A second loop reads the hidden channels of the same layer of the first."""

  def first(h, p):
    y = jnp.tanh(h @ p["up"])
    return h + y @ p["down"], y

  def second(h, row):
    y, p = row
    return h + jnp.sin(y + p["bias"][None]) @ p["down"], None

  h, hidden = lax.scan(first, x, p)
  return lax.scan(second, h, (hidden, p))[0]


def mapped(p, x):
  return jax.vmap(lambda x: run(p, x[None])[0])(x)


OWN = [
  residual,
  backwards,
  cast,
  scaled,
  recomputed,
  chosen,
  reported,
  skipped,
  mapped,
]


def carried(p, x):
  """The hidden channels of one layer are added to those of the next."""

  def step(carry, p):
    h, y = carry
    y = y + jnp.tanh(h @ p["up"] + p["bias"][None])
    return (h + y @ p["down"], y), None

  return lax.scan(step, (x, jnp.zeros((3, 5))), p)[0][0]


def of_one_bias(p, x):
  bias = p["bias"].sum(0)[None]

  def step(h, p):
    return h + jnp.tanh(h @ p["up"] + bias) @ p["down"], None

  return lax.scan(step, x, {"up": p["up"], "down": p["down"]})[0]


def turned(p, x):
  return run(moved(p, lambda up: up[::-1]), x)


def turned_by_hand(p, x):
  last_first = [3, 2, 1, 0]
  return run(moved(p, lambda up: jnp.stack([up[i] for i in last_first])), x)


def regrouped(p, x):
  """Layers 0 1 2 3 become 0 2 1 3, without an index."""

  def regroup(up):
    return up.reshape(2, 2, 4, 5).swapaxes(0, 1).reshape(4, 4, 5)

  return run(moved(p, regroup), x)


def rolled(p, x):
  return run(moved(p, lambda up: jnp.concatenate([up[1:], up[:1]])), x)


def accumulated(p, x):
  return run(moved(p, lambda up: jnp.cumsum(up, axis=0)), x)


def mixed(p, x):
  mixture = jnp.sin(jnp.arange(16.0)).reshape(4, 4)
  return run(moved(p, lambda up: jnp.einsum("lm,mio->lio", mixture, up)), x)


def compared(p, x):
  """The products of all pairs of layers are used."""
  pairs = jnp.einsum("lin,mjn->ljmi", p["up"], p["up"])
  return run(p, x) + jnp.sin(pairs).sum()


def added_crosswise(p, x):
  pairs = p["bias"][:, None] * jnp.ones((1, 4, 1))
  pairs = jnp.sin(pairs + pairs.swapaxes(0, 1))
  return run(p, x) + pairs.sum()


def averaged(p, x):
  return run(moved(p, lambda up: up + up.mean(0, keepdims=True)), x)


def indexed(p, x):
  def step(i, h):
    return layer(h, {name: leaf[i] for name, leaf in p.items()})

  return lax.fori_loop(0, 4, step, x)


def applied_first(p, x):
  return run(p, layer(x, {name: leaf[0] for name, leaf in p.items()}))


def reported_and_added(p, x):
  def step(h, p):
    y = jnp.tanh(h @ p["up"] + p["bias"][None])
    return h + y @ p["down"], y

  h, hidden = lax.scan(step, x, p)
  return h, jnp.square(hidden.sum(0)).sum(-1)


SHARED = [
  carried,
  of_one_bias,
  turned,
  turned_by_hand,
  regrouped,
  rolled,
  accumulated,
  mixed,
  compared,
  added_crosswise,
  averaged,
  indexed,
  applied_first,
  reported_and_added,
]


@pytest.mark.parametrize("program", OWN + SHARED, ids=lambda p: p.__name__)
def test_hidden_channels_have_own_orders_where_layers_are_apart(program):
  params = programs.draw(**SHAPES)
  with jax.numpy_dtype_promotion("standard"):
    axes = discover.discover_channels(program, params, X)
    assert axes == discover.infer_channels(program, params, X)
  places = list(channels.places(axes))
  assert {path for path, *_ in places} == SHAPES.keys()
  assert {axis.stacked for *_, axis in places} == {
    (0,) if program in OWN else ()
  }


def test_finds_exactly_the_orders_of_each_layer():
  """Against a search of all orders of the layers, taken apart."""
  apart = programs.draw(
    stem=(2, 2), up0=(2, 2), up1=(2, 2), down0=(2, 2), down1=(2, 2), head=(2, 2)
  )

  def join(p):
    stacks = {
      name: jnp.stack([p[f"{name}{i}"] for i in range(2)])
      for name in ("up", "down")
    }
    return {"stem": p["stem"], **stacks, "head": p["head"]}

  def scanned(p, x):
    def step(h, p):
      return h + jnp.tanh(h @ p["up"]) @ p["down"], None

    stack = {name: p[name] for name in ("up", "down")}
    return lax.scan(step, x @ p["stem"], stack)[0] @ p["head"]

  stacked = join(apart)
  axes = discover.discover_channels(scanned, stacked, programs.INPUT)
  axes_apart = {"stem": axes["stem"], "head": axes["head"]}
  for name in ("up", "down"):
    for i in range(2):
      axes_apart[f"{name}{i}"] = tuple(
        axis._replace(
          group=dict(axis.groups((2,))).get((i,), axis.group), stacked=()
        )
        for axis in axes[name][1:]
      )
  spanned = programs.spanned_orders(apart, axes_apart)
  assert len(spanned) == 8
  assert spanned == programs.preserved_orders(
    lambda p, x: scanned(join(p), x), apart
  )


def test_layers_in_layers_have_an_order_each():
  shapes = {"up": (4, 2, 3, 5), "down": (2, 5, 3, 4), "mix": (3, 4, 4)}

  def run(p, x):
    def outer(h, p):
      def inner(h, p):
        return h + jnp.tanh(h @ p["up"]) @ p["down"], None

      return jnp.tanh(lax.scan(inner, h, p["inner"])[0] @ p["mix"]), None

    inner = {
      "up": jnp.moveaxis(p["up"], (2, 1), (0, 1)),
      "down": jnp.moveaxis(p["down"], (2, 0), (0, 1)),
    }
    return lax.scan(outer, x, {"inner": inner, "mix": p["mix"]})[0]

  params = programs.draw(**shapes)
  axes = discover.discover_channels(run, params, X)
  assert axes["up"][3].stacked == (2, 1)
  assert axes["down"][1].stacked == (2, 0)
  names = list(channels.group_sizes(params, axes))
  assert names[:3] == [f"up, layer 0.{i}" for i in range(2)] + ["up, layer 1.0"]


class Layer(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    y = nn.tanh(nn.Dense(6, name="up")(x))
    return x + nn.Dense(x.shape[-1], name="down")(y), None


@pytest.mark.parametrize("axis", [0, 1])
def test_scans_of_linen(axis):
  stack = nn.scan(
    nn.remat(Layer),
    variable_axes={"params": axis},
    split_rngs={"params": True},
    length=3,
  )()
  variables = jax.tree.map(
    lambda leaf: leaf + 0.1, stack.init(jax.random.key(0), X, None)
  )
  axes = discover.discover_channels(
    lambda v, x: stack.apply(v, x, None)[0], variables, X
  )
  assert {
    path.removeprefix("params/"): (dim, axis.stacked)
    for path, dim, axis in channels.places(axes)
  } == {
    "up/kernel": (2, (axis,)),
    "up/bias": (1 - axis, (axis,)),
    "down/kernel": (1 - axis, (axis,)),
  }


def test_scans_of_nnx():
  class Stack(nnx.Module):
    def __init__(self, rngs):
      def make(features):
        make = nnx.vmap(lambda rngs: nnx.Linear(*features, rngs=rngs))
        return nnx.split_rngs(splits=3)(make)(rngs)

      self.up, self.down = make((4, 6)), make((6, 4))

    def __call__(self, x):
      def step(up, down, x):
        return x + down(jnp.tanh(up(x)))

      run = nnx.scan(step, in_axes=(0, 0, nnx.Carry), out_axes=nnx.Carry)
      return run(self.up, self.down, x)

  net = Stack(nnx.Rngs(0))
  axes = discover.discover_channels(lambda net, x: net(x), net, X)
  assert channels.group_sizes(net, axes) == {
    f"up, layer {i}": 6 for i in range(3)
  }
  assert list(axes) == ["up/kernel", "up/bias", "down/kernel"]

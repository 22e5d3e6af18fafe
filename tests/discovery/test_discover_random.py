"""Whatever discovery leaves free passes the self-check: random programs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pqf_jax.core import channels
from pqf_jax.discovery import discover

Step = Callable[[dict[str, Any], jax.Array], jax.Array]
NUM_PROGRAMS = 12
NUM_STEPS = 7


class Builder:
  """Draws the steps of a program, and the parameters they need."""

  def __init__(self, seed: int) -> None:
    self.rng = np.random.default_rng(seed)
    self.params: dict[str, np.ndarray] = {}
    self.shape = [2, *map(int, self.rng.choice([3, 4, 6], 2))]

  def parameter(self, *shape: int) -> str:
    name = f"p{len(self.params)}"
    self.params[name] = self.rng.standard_normal(shape).astype(np.float32)
    return name

  def step(self, kind: str = "") -> Step:
    """A step on a random axis, for which this is moved to the end."""
    dim = int(self.rng.integers(len(self.shape)))
    length = self.shape.pop(dim)
    lead = list(self.shape)
    ones = [1] * len(lead)
    kinds = [name for name in KINDS if length % 2 == 0 or name not in EVEN]
    kind = kind or str(self.rng.choice(kinds))
    change, end = KINDS[kind](self, lead, ones, length)
    self.shape = lead + end

    def run(p: dict[str, Any], x: jax.Array) -> jax.Array:
      return change(p, jnp.moveaxis(x, dim, -1))

    return run


def dense(b: Builder, lead: list[int], ones: list[int], n: int) -> Any:
  m = int(b.rng.choice([3, 4, 6]))
  kernel, bias = b.parameter(n, m), b.parameter(*ones, m)
  return lambda p, x: jnp.tanh(x @ p[kernel] + p[bias]), [m]


def scale(b: Builder, lead: list[int], ones: list[int], n: int) -> Any:
  name = b.parameter(*lead, n)
  return lambda p, x: x * p[name], [n]


def gate(b: Builder, lead: list[int], ones: list[int], n: int) -> Any:
  del b, lead, ones
  return lambda p, x: jnp.prod(jnp.stack(jnp.split(x, 2, -1)), 0), [n // 2]


def heads(b: Builder, lead: list[int], ones: list[int], n: int) -> Any:
  del b, ones
  return lambda p, x: x.reshape(*lead, 2, n // 2), [2, n // 2]


def unite(b: Builder, lead: list[int], ones: list[int], n: int) -> Any:
  del b, ones
  last = lead.pop()
  return lambda p, x: x.reshape(*x.shape[:-2], last * n), [last * n]


def shuffle(b: Builder, lead: list[int], ones: list[int], n: int) -> Any:
  del b, lead, ones

  def run(p: Any, x: jax.Array) -> jax.Array:
    del p
    pairs = x.reshape(*x.shape[:-1], 2, n // 2)
    return pairs.swapaxes(-1, -2).reshape(x.shape)

  return run, [n]


def join(b: Builder, lead: list[int], ones: list[int], n: int) -> Any:
  m = int(b.rng.choice([1, n]))
  name = b.parameter(*lead, m)
  return lambda p, x: jnp.concatenate([x, p[name]], -1), [n + m]


def grow(b: Builder, lead: list[int], ones: list[int], n: int) -> Any:
  change, (m,) = dense(b, lead, ones, n)
  return lambda p, x: jnp.concatenate([x, change(p, x)], -1), [n + m]


def normalize(b: Builder, lead: list[int], ones: list[int], n: int) -> Any:
  del b, lead, ones
  return lambda p, x: jax.nn.standardize(x, -1), [n]


def attend(b: Builder, lead: list[int], ones: list[int], n: int) -> Any:
  del b, lead, ones
  return lambda p, x: jax.nn.softmax(x @ x.swapaxes(-1, -2)) @ x, [n]


def accumulate(b: Builder, lead: list[int], ones: list[int], n: int) -> Any:
  del b, lead, ones
  return lambda p, x: jnp.cumsum(x, -1), [n]


def crop(b: Builder, lead: list[int], ones: list[int], n: int) -> Any:
  start = int(b.rng.integers(n // 2 + 1))
  return lambda p, x: lax.slice_in_dim(x, start, start + n // 2, axis=-1), [
    n // 2
  ]


def recur(b: Builder, lead: list[int], ones: list[int], n: int) -> Any:
  name = b.parameter(*lead)

  def run(p: Any, x: jax.Array) -> jax.Array:
    def step(carry: jax.Array, part: jax.Array) -> tuple[jax.Array, jax.Array]:
      return jnp.tanh(carry * p[name] + part), carry + part

    return jnp.moveaxis(
      lax.scan(step, jnp.zeros(lead, x.dtype), jnp.moveaxis(x, -1, 0))[1],
      0,
      -1,
    )

  return run, [n]


def layers(b: Builder, lead: list[int], ones: list[int], n: int) -> Any:
  """Layers of a stack that may be turned, averaged, or reported."""
  del lead
  m = int(b.rng.choice([3, 4]))
  up, down, bias = (
    b.parameter(2, *shape) for shape in ((n, m), (m, n), (*ones, m))
  )
  turned, averaged, reported, carried = b.rng.random(4) < 0.3

  def run(p: dict[str, Any], x: jax.Array) -> jax.Array:
    def step(carry: Any, layer: Any) -> tuple[Any, jax.Array]:
      (h, y), (up, down, bias) = carry, layer
      new = jnp.tanh(h @ up + bias)
      y = y + new if carried else new
      return (h + jnp.sin(y @ down), y), new

    ups = p[up][::-1] if turned else p[up]
    biases = p[bias]
    if averaged:
      biases = biases + biases.mean(0, keepdims=True)
    start = jnp.zeros((*x.shape[:-1], m), x.dtype)
    (h, _), made = lax.scan(step, (x, start), (ups, p[down], biases))
    return h + jnp.square(made).sum((0, -1))[..., None] if reported else h

  return run, [n]


KINDS = {
  kind.__name__: kind
  for kind in (
    dense,
    scale,
    gate,
    heads,
    unite,
    shuffle,
    join,
    grow,
    normalize,
    attend,
    accumulate,
    crop,
    recur,
    layers,
  )
}
EVEN = {"gate", "heads", "shuffle", "crop"}


@pytest.mark.filterwarnings("error:permuting the channel groups")
@pytest.mark.filterwarnings("error:.*no rule for the primitives")
@pytest.mark.filterwarnings("ignore:the self-check of .* proves nothing")
@pytest.mark.filterwarnings("ignore:these kernels keep the order")
@pytest.mark.parametrize("seed", range(NUM_PROGRAMS))
def test_no_group_of_a_random_program_fails_the_check(seed):
  builder = Builder(seed)
  start = builder.parameter(*builder.shape)
  steps = []
  for _ in range(NUM_STEPS):
    if 2 <= len(builder.shape) <= 4 and np.prod(builder.shape) < 500:
      steps.append(builder.step())
  steps.append(builder.step("dense"))  # so that there is a group at least
  last = builder.parameter(*builder.shape)

  def run(p: dict[str, Any], x: jax.Array) -> jax.Array:
    values = p[start] * x
    for step in steps:
      values = step(p, values)
    return (values * p[last]).sum()

  axes = discover.discover_channels(run, builder.params, jnp.ones(()))
  assert axes == discover.infer_channels(run, builder.params, jnp.ones(()))
  assert channels.group_sizes(builder.params, axes)

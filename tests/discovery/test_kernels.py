"""What the axes of kernels are for, read from small networks of every kind."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax

from pqf_jax.core import blocks
from pqf_jax.discovery import kernels

Axes = blocks.KernelAxes
DENSE = Axes((0,), (1,))

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


def struct(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


def find(function, *inputs, **shapes):
  variables = {name: struct(*shape) for name, shape in shapes.items()}
  return kernels.find_kernels(function, variables, *inputs)


def find_linen(module, *inputs):
  variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)
  return kernels.find_kernels(module.apply, variables, *inputs)


X = struct(2, 6)
W = {"w": (6, 4)}


def scanned(p, x):
  return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]


def looped(p, x):
  return lax.fori_loop(0, 3, lambda i, h: h @ p["w"][i], x)


def carried(p, x):
  def step(carry, _):
    w, h = carry
    return (w, h @ w), None

  return lax.scan(step, (p["w"], x), length=2)[0][1]


def chosen(p, x):
  return lax.cond(x.sum() > 0, lambda: x @ p["w"], lambda: x @ p["w"] + 1)


def conv(layout):
  def apply(p, x):
    return lax.conv_general_dilated(
      x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", layout, "NHWC")
    )

  return apply


def experts(p, x):
  return jnp.einsum("bi,eio->beo", x, p["w"])


def batched(p, x):
  return jnp.einsum("ebi,eio->ebo", x, p["w"])


def ensemble(p, x):
  return jax.vmap(lambda w: x @ w)(p["w"])


def ensembles(p, x):
  return jax.vmap(jax.vmap(lambda w: x @ w[...], 1), 2)(p["w"])


def picked_experts(p, x):
  w = p["w"][jnp.argmax(x, -1)]  # an expert for each row
  return jnp.einsum("bi,bio->bo", x, w)


def normed(p, x):
  w = p["v"] * p["g"][None] / jnp.linalg.norm(p["v"], axis=0, keepdims=True)
  return x @ w + p["b"][None]


def spectral(p, x):
  u = p["w"] @ (p["w"].T @ p["u"])
  return x @ (p["w"] / jnp.linalg.norm(u))


def tied(p, ids):
  return jnp.take(p["table"], ids, axis=0) @ p["table"].T


def positions(p, x):
  return x + jnp.take(p["table"], jnp.arange(2), axis=0)


def relative(p, x):  # a bias of pairs of places, as in Swin and T5
  places = jnp.arange(2)
  return jnp.einsum(
    "ijh,jf->ihf", p["table"][places[:, None] - places[None] + 1], x
  )


@pytest.mark.parametrize(
  ("function", "inputs", "shapes", "expected"),
  [
    (lambda p, x: x @ p["w"] + p["b"][None], X, W | {"b": (4,)}, DENSE),
    (lambda p, x: p["w"].T @ x.T, X, W, DENSE),
    (lambda p, x: x @ p["w"].T, X, {"w": (4, 6)}, Axes((1,), (0,))),
    (
      lambda p, x: x @ p["w"].astype(x.dtype),
      struct(2, 6, dtype="bfloat16"),
      W,
      DENSE,
    ),
    (lambda p, x: jax.jit(jnp.dot)(x, p["w"]), X, W, DENSE),
    (lambda p, x: jax.checkpoint(jnp.dot)(x, p["w"]), X, W, DENSE),
    (
      lambda p, x: x @ p["w"].reshape(6, 4),
      X,
      {"w": (6, 2, 2)},
      Axes((0,), (1, 2)),
    ),
    (lambda p, x: x @ p["w"][:, :2], X, W, DENSE),
    (lambda p, x: x @ jnp.concatenate([p["w"]] * 2, 1), X, W, DENSE),
    (lambda p, x: x @ (2 * p["w"] - p["w"].mean()), X, W, DENSE),
    (lambda p, x: x @ p["w"][0], X, {"w": (3, 6, 4)}, Axes((1,), (2,), (0,))),
    (scanned, X, {"w": (3, 6, 6)}, Axes((1,), (2,), (0,))),
    (scanned, X, {"w": (1, 6, 6)}, Axes((1,), (2,), (0,))),
    (looped, X, {"w": (3, 6, 6)}, Axes((1,), (2,), (0,))),
    (carried, X, {"w": (6, 6)}, DENSE),
    (chosen, X, W, DENSE),
    (normed, X, {"v": (6, 4), "g": (4,), "b": (4,)}, DENSE),
    (spectral, X, {"w": (6, 4), "u": (6,)}, DENSE),
    (experts, X, {"w": (3, 6, 4)}, Axes((1,), (0, 2))),
    (batched, struct(3, 2, 6), {"w": (3, 6, 4)}, Axes((1,), (2,), (0,))),
    (ensemble, X, {"w": (3, 6, 4)}, Axes((1,), (2,), (0,))),
    (ensembles, X, {"w": (6, 2, 3, 4)}, Axes((0,), (3,), (1, 2))),
    (picked_experts, X, {"w": (6, 6, 4)}, Axes((1,), (2,), (0,))),
    (conv("HWIO"), struct(1, 5, 5, 6), {"w": (3, 3, 6, 4)}, Axes((2,), (3,))),
    (conv("OIHW"), struct(1, 5, 5, 6), {"w": (4, 6, 3, 3)}, Axes((1,), (0,))),
    (tied, struct(5, dtype=jnp.int32), {"table": (9, 4)}, Axes((1,), (0,))),
    (positions, X, {"table": (9, 6)}, Axes((1,), (0,))),
    (relative, X, {"table": (3, 4)}, Axes((1,), (0,))),
  ],
)
def test_the_equation_that_reads_a_kernel_tells_its_axes(
  function, inputs, shapes, expected
):
  found = find(function, inputs, **shapes)
  assert found == {next(iter(shapes)): expected}


def test_what_no_product_reads_is_no_kernel():
  shapes = {"position": (2, 6), "scale": (2, 6), "unused": (3, 3), "w": (6, 4)}
  found = find(
    lambda p, x: ((x + p["position"]) * p["scale"]) @ p["w"], X, **shapes
  )
  assert found == {"w": DENSE}


def test_tables_that_are_added_whole_or_sliced_are_no_kernels():
  shapes = {"whole": (1, 2, 6), "longer": (9, 6), "rows": (9, 6)} | W
  found = find(
    lambda p, x: (
      (x + p["whole"][0] + p["longer"][:2] + p["rows"][jnp.array(3)][None])
      @ p["w"]
    ),
    X,
    **shapes,
  )
  assert found == {"w": DENSE}


def test_kernels_that_are_read_along_different_axes_are_said():
  with pytest.warns(UserWarning, match="different axes.*: w$"):
    found = find(lambda p, x: x @ p["w"] @ p["w"].T, X, **W)
  assert found == {"w": DENSE}


class Attention(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.MultiHeadDotProductAttention(2, name="a")(x, x)


class Body(nn.Module):
  @nn.compact
  def __call__(self, x, _=None):
    return nn.tanh(nn.Dense(6, name="d")(x)), None


class Wide(nn.Module):
  inputs: int | None = None
  layer: nn.Module = nn.Dense

  @nn.compact
  def __call__(self, x):
    return nn.vmap(
      self.layer,
      in_axes=self.inputs,
      axis_size=3,
      variable_axes={"params": 0},
      split_rngs={"params": True},
    )(4, **({} if self.layer is nn.Dense else {"kernel_size": (3, 3)}))(x)


def stack(axis):
  return nn.scan(
    Body, variable_axes={"params": axis}, split_rngs={"params": True}, length=3
  )()


def test_attention():
  found = find_linen(Attention(), jnp.ones((1, 5, 8)))
  project = Axes((0,), (1, 2))
  assert {path.split("/")[2]: axes for path, axes in found.items()} == {
    "query": project,
    "key": project,
    "value": project,
    "out": Axes((0, 1), (2,)),
  }


@pytest.mark.parametrize(
  ("module", "inputs", "expected"),
  [
    (nn.Embed(9, 4), jnp.ones(3, int), Axes((1,), (0,))),
    (stack(0), jnp.ones((2, 6)), Axes((1,), (2,), (0,))),
    (stack(1), jnp.ones((2, 6)), Axes((0,), (2,), (1,))),
    (Wide(), jnp.ones((2, 6)), Axes((1,), (2,), (0,))),
    (Wide(0), jnp.ones((3, 2, 6)), Axes((1,), (2,), (0,))),
    (Wide(None, nn.Conv), jnp.ones((1, 5, 5, 6)), Axes((3,), (4,), (0,))),
    (Wide(0, nn.Conv), jnp.ones((3, 1, 5, 5, 6)), Axes((3,), (4,), (0,))),
    (nn.WeightNorm(nn.Dense(4)), jnp.ones((2, 6)), DENSE),
    (nn.Conv(4, (3, 3)), jnp.ones((1, 5, 5, 6)), Axes((2,), (3,))),
    (
      nn.Conv(6, (3, 3), feature_group_count=6),
      jnp.ones((1, 5, 5, 6)),
      Axes((2,), (3,)),
    ),
    (nn.ConvTranspose(4, (2, 2)), jnp.ones((1, 5, 5, 6)), Axes((2,), (3,))),
    (
      nn.ConvTranspose(4, (2, 2), transpose_kernel=True),
      jnp.ones((1, 5, 5, 6)),
      Axes((3,), (2,)),
    ),
  ],
)
def test_layers_of_flax(module, inputs, expected):
  assert list(find_linen(module, inputs).values()) == [expected]

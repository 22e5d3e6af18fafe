"""Networks apply compressed kernels as they apply the decoded ones."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from pqf_jax import errors
from pqf_jax.core import plan as plans
from pqf_jax.core import trees, vq_array
from pqf_jax.discovery import kernels, readers
from tests.discovery import test_kernels as networks

decode = vq_array.decode_params
RULES = [plans.Rule(".*", 4, channels=2)]


def fill(shapes):
  """Random numbers of these shapes; codes below 4."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: jnp.asarray(
      rng.normal(size=leaf.shape) / 2
      if jnp.issubdtype(leaf.dtype, jnp.floating)
      else rng.integers(0, 2, leaf.shape),
      leaf.dtype,
    ),
    shapes,
  )


def compressed(apply_fn, variables, *inputs):
  found = kernels.find_kernels(apply_fn, variables, *inputs)
  plan = plans.make_plan(RULES, variables, found)
  readers.check_readers(apply_fn, plan, variables, *inputs)
  return plans.compressed_shapes(plan, variables)


def check(apply_fn, variables, *inputs):
  """Applies random codes, and what they decode to."""
  nodes = fill(compressed(apply_fn, variables, *inputs))
  assert any(
    map(vq_array.is_vq, jax.tree.leaves(nodes, is_leaf=vq_array.is_vq))
  )
  dense = vq_array.decode_params(nodes)
  assert trees.shapes(dense) == trees.shapes(variables)
  np.testing.assert_allclose(
    jax.jit(apply_fn)(nodes, *inputs), apply_fn(dense, *inputs), atol=1e-5
  )


@pytest.mark.parametrize(
  ("module", "inputs"),
  [
    (nn.MultiHeadDotProductAttention(2), jnp.ones((1, 5, 8))),
    (nn.Embed(16, 8), jnp.arange(3)),
    (networks.Wide(), jnp.ones((2, 6))),
    (networks.Wide(0), jnp.ones((3, 2, 6))),
    (networks.Wide(None, nn.Conv), jnp.ones((1, 5, 5, 6))),
    (
      nn.ConvTranspose(4, (2, 2), transpose_kernel=True),
      jnp.ones((1, 5, 5, 6)),
    ),
  ],
)
def test_layers_of_linen(module, inputs):
  variables = module.init(jax.random.key(0), inputs)
  check(module.apply, variables, inputs)


@pytest.mark.parametrize("axis", [0, 1])
def test_scanned_layers_of_linen(axis):
  module, x = networks.stack(axis), jnp.ones((2, 6))
  variables = module.init(jax.random.key(0), x)
  check(lambda v, x: module.apply(v, x)[0], variables, x)


W = jnp.ones((3, 8, 8))


@pytest.mark.parametrize(
  ("function", "variables"),
  [
    (networks.scanned, {"w": W}),
    (networks.looped, {"w": W}),
    (networks.carried, {"w": W[0]}),
    (networks.ensemble, {"w": W}),
    (networks.ensembles, {"w": jnp.ones((8, 2, 3, 8))}),
    (networks.experts, {"w": W}),
    (lambda p, x: jax.vmap(jnp.dot, (None, 1))(x, p[0]), [W.swapaxes(0, 1)]),
    (lambda p, x: x @ p["linear"]["w"].T, {"linear": {"w": W[0]}}),
    (lambda p, x: lax.dot(x, p["w"][...]), {"w": W[0]}),
    (lambda p, x: lax.dot(x, decode(p)["w"]), {"w": W[0]}),
    (lambda p, x: networks.scanned(decode(p), x), {"w": W}),
    (lambda p, x: networks.ensemble(decode(p), x), {"w": W}),
  ],
)
def test_functions(function, variables):
  check(function, variables, jnp.ones((2, 8)))


def test_nnx_layers():
  graph, state = nnx.split(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
  check(
    lambda p, x: nnx.merge(graph, nnx.restore_int_paths(p))(x),
    nnx.to_pure_dict(state),
    jnp.ones((2, 8)),
  )


def test_functions_of_arrays_only_are_refused_before_any_work():
  shapes = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}
  for function in (
    lambda p, x: lax.dot(x @ p["a"], p["b"]),
    lambda p, x: lax.conv(
      (x @ p["a"])[:, :, None, None],
      lax.expand_dims(p["b"], (2, 3)),
      (1, 1),
      "SAME",
    ),
  ):
    with pytest.raises(errors.InputError, match=r"cannot read b once .*lax"):
      compressed(function, shapes, jnp.ones((2, 8)))


def test_layers_that_rename_variables_are_refused_before_any_work():
  module = nn.WeightNorm(nn.Dense(4))
  variables = module.init(jax.random.key(0), jnp.ones((2, 8)))
  with pytest.raises(errors.InputError, match=r"/kernel once .*decode_params"):
    compressed(module.apply, variables, jnp.ones((2, 8)))
  check(lambda v, x: module.apply(decode(v), x), variables, jnp.ones((2, 8)))

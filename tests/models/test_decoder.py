"""The decoder whose blocks are one stack computes what blocks apart do."""

import jax
import jax.numpy as jnp
import numpy as np

from pqf_jax.models import decoder

SIZES = {"features": 16, "heads": 2, "depth": 3, "positions": 8}


def test_a_stack_of_blocks_is_the_same_function_with_the_same_gradients():
  apart, scanned = (
    decoder.make(**SIZES, scanned=scanned) for scanned in (False, True)
  )
  tokens = jax.random.randint(jax.random.key(0), (2, 8), 0, 256)
  params = jax.jit(apart.init)(jax.random.key(1), tokens)["params"]

  def stacked(params):
    blocks = [params[f"block{i}"] for i in range(SIZES["depth"])]
    rest = {name: p for name, p in params.items() if "block" not in name}
    return rest | {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *blocks)}

  def loss(params, network, arrange):
    logits = network.apply({"params": arrange(params)}, tokens)
    return jnp.square(logits).mean()

  grad = jax.jit(jax.value_and_grad(loss), static_argnums=(1, 2))
  one, other = (
    grad(params, network, arrange)
    for network, arrange in ((apart, lambda x: x), (scanned, stacked))
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    one,
    other,
  )

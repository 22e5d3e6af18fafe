"""Convolutions with more taps than places are compiled as they are written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pqf_jax.discovery import small_maps

# In XLA's text, of a convolution whose operands were swapped.
SWAPPED = "rhs_reversal"


def _convolve(kernel, maps, groups=1):
  return lax.conv_general_dilated(
    maps,
    kernel,
    (1, 1),
    "SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=groups,
  )


def _arguments(side, groups=1):
  rng = np.random.default_rng(0)
  return (
    jnp.asarray(rng.normal(size=(3, 3, 4 // groups, 4)), jnp.float32),
    jnp.asarray(rng.normal(size=(2, side, side, 4)), jnp.float32),
  )


@pytest.mark.parametrize(
  ("side", "groups", "is_swapped"), [(1, 1, 1), (2, 1, 1), (3, 1, 0), (2, 4, 0)]
)
def test_options_are_for_what_xla_swaps(side, groups, is_swapped):
  arguments = _arguments(side, groups)
  compiled = jax.jit(_convolve, static_argnums=2).lower(*arguments, groups)
  # One tap of a map of one place sees it: XLA has simpler words for that.
  is_seen = SWAPPED in compiled.compile().as_text()
  assert side == 1 or is_seen == is_swapped
  program = jax.make_jaxpr(_convolve, static_argnums=2)(*arguments, groups)
  options = small_maps.compiler_options(small_maps.equations(program))
  assert bool(options) == is_swapped


def test_a_gradient_is_the_same_and_nothing_in_it_is_swapped():
  @jax.jit
  def loss(kernel, maps):
    def step(carry, _):
      return jnp.tanh(_convolve(kernel, carry)), None

    return jnp.sum(lax.scan(step, maps, length=2)[0])

  arguments = _arguments(2)
  gradient = jax.grad(loss, (0, 1))
  program = jax.make_jaxpr(gradient)(*arguments)
  options = small_maps.compiler_options(small_maps.equations(program))
  text = jax.jit(gradient, compiler_options=options).lower(*arguments)
  assert SWAPPED not in text.compile().as_text()
  found = small_maps.jit(gradient)(*arguments)
  for value, wanted in zip(found, gradient(*arguments), strict=True):
    np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-5)


def test_other_platforms_get_no_options(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  program = jax.make_jaxpr(_convolve)(*_arguments(1))
  assert not small_maps.compiler_options(small_maps.equations(program))

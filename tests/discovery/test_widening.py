"""Programs made float64, against the same function written in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pqf_jax.discovery import tracing, widening


def loops(x: jax.Array) -> jax.Array:
  """Narrow types everywhere; constants that bfloat16 holds exactly."""
  x = x.astype(jnp.float32) * jnp.float32(0.5) + jnp.bfloat16(0.25)
  x = lax.scan(lambda c, y: (jnp.tanh(c + y), c * y), x[0], x)[1]
  x = lax.fori_loop(0, 3, lambda i, y: y * y + 0.125, x)
  x = lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x)
  x = jax.checkpoint(jnp.exp)(jax.nn.relu(x - 0.25)).astype(jnp.bfloat16)
  return jnp.einsum("ij,kj->ik", x, x, preferred_element_type=jnp.float32)


def loops_in_float64(x: np.ndarray) -> np.ndarray:
  x = x * 0.5 + 0.25
  carry, rows = x[0], []
  for row in x:
    carry, product = np.tanh(carry + row), carry * row
    rows.append(product)
  x = np.stack(rows)
  for _ in range(3):
    x = x * x + 0.125
  x = np.sin(x) if x.sum() > 0 else np.cos(x)
  x = np.exp(np.maximum(x - 0.25, 0))
  return x @ x.T


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@jax.numpy_dtype_promotion("standard")
def test_equals_the_function_written_in_float64(dtype):
  x = np.random.default_rng(0).standard_normal((4, 5))
  program = tracing.trace_program(loops, jnp.zeros((4, 5), dtype), ())
  with jax.enable_x64(True):
    (result,) = jax.jit(lambda x: widening.run_widened(program, [x]))(x)
  assert result.dtype == np.float64
  expected = loops_in_float64(x)
  np.testing.assert_allclose(result, expected, rtol=1e-13)
  narrow = np.asarray(loops(jnp.asarray(x, dtype)), np.float64)
  assert np.abs(narrow - expected).max() > 1e-4


def test_reinterpreted_bits_are_refused():
  program = tracing.trace_program(
    lambda x: lax.bitcast_convert_type(x, jnp.int32), jnp.zeros(3), ()
  )
  with jax.enable_x64(True), pytest.raises(TypeError):
    widening.run_widened(program, [np.zeros(3)])

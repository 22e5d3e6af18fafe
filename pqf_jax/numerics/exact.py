"""Inner products that round alike in every program.

XLA may fuse a product with the addition behind it, which rounds once where two
operations round twice, and may add in any order; both depend on the shapes. On
CPUs the last bit of |c|^2 of a codebook changed where four layers or more
shared a call, and with it now and then a code.
"""

import itertools

import jax
import jax.numpy as jnp
from jax import lax


def dot(left: jax.Array, right: jax.Array) -> jax.Array:
  """Sums left * right over the last axis, in its order.

  Products are exact, so each addition rounds the same sum, fused or not.

  Args:
    left: [..., D] float32; the D terms are unrolled.
    right: of the same shape.
  """
  products = (
    one * other
    for i in range(left.shape[-1])
    for one, other in itertools.product(
      _halves(left[..., i]), _halves(right[..., i])
    )
  )
  return sum(products, start=jnp.float32(0))


def _halves(values: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns two arrays of 12-bit numbers, half of 24, that add to `values`."""
  high = lax.reduce_precision(values, 8, 11)
  return high, values - high

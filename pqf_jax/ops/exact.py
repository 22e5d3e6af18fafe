"""Inner products that round alike in every program.

XLA may fuse a product with the addition behind it, which rounds once where two
operations round twice, and adds in what order it likes; both depend on the
shapes. On CPUs the last bit of |c|^2 of a codebook changed where four layers
or more shared a call, and with it now and then a code.
"""

import jax
from jax import lax

# Of the 24 bits of a float32 number: products of two halves are exact.
_HALF = 12


def dot(left: jax.Array, right: jax.Array) -> jax.Array:
  """Sums left * right over the last axis, in its order.

  Products are exact, so each addition rounds the same sum, fused or not.

  Args:
    left: [..., D] float32; the D terms are unrolled.
    right: of the same shape.
  """
  total = 0.0
  for i in range(left.shape[-1]):
    for one in _halves(left[..., i]):
      for other in _halves(right[..., i]):
        total = total + one * other
  return total


def _halves(values: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Two arrays of 12-bit numbers whose sum is `values`."""
  high = lax.reduce_precision(values, 8, _HALF - 1)
  return high, values - high

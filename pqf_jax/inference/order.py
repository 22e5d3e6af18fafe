"""Keeps compilers from computing things long before they are needed."""

import jax
import jax.numpy as jnp
from jax import lax

from pqf_jax.core import trees


def zero_after(value: jax.Array, codes: trees.Array) -> jax.Array:
  """Returns 0 in uint32, which compilers do not foresee, once a value is there.

  What it is added to is computed no earlier, and takes memory no earlier.

  Args:
    value: of any shape and a type of real numbers.
    codes: any integers that compilers do not know.
  """
  code = jnp.asarray(codes).reshape(-1)[0]
  return _zero_after(lax.stop_gradient(value), code)


@jax.custom_batching.custom_vmap
def _zero_after(value: jax.Array, code: jax.Array) -> jax.Array:
  return lax.platform_dependent(
    value, code, cpu=_zero_of_either, default=_zero_of_first
  )


@_zero_after.def_vmap
def _zero_after_all(
  axis_size: int, in_batched: list[bool], values: jax.Array, codes: jax.Array
) -> tuple[jax.Array, bool]:
  # One kernel serves all examples of a batch.
  del axis_size, in_batched
  return _zero_after(values, codes.reshape(-1)[0]), False


def _zero_of_either(value: jax.Array, code: jax.Array) -> jax.Array:
  # A choice is never fused. What is fused with a value's last step computes it
  # once more, in part, and so holds what it was computed of. GPUs would wait
  # for the host to choose.
  return lax.cond(code == 0, _zero_of_first, _zero_of_last, value, code)


def _zero_of_first(value: jax.Array, code: jax.Array) -> jax.Array:
  del code
  return _zero_of(value.reshape(-1)[0])


def _zero_of_last(value: jax.Array, code: jax.Array) -> jax.Array:
  del code
  return _zero_of(value.reshape(-1)[-1])


def _zero_of(number: jax.Array) -> jax.Array:
  bits = lax.bitcast_convert_type(number.astype(jnp.float32), jnp.uint32)
  return lax.shift_right_logical(
    lax.shift_right_logical(bits, jnp.uint32(16)), jnp.uint32(16)
  )

"""What of padded samples counts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pqf_jax import errors
from pqf_jax.core import modules

PyTree = Any
MaskFn = Callable[..., jax.Array]


def make_mask(mask_fn: MaskFn | None, batch: tuple[PyTree, ...]) -> jax.Array:
  """Returns what counts in a batch; a single True: everything.

  Args:
    mask_fn: `mask_fn(*inputs)` -> bool, False for padding; None: there is none.
    batch: the inputs.

  Raises:
    InputError: it is no mask, or nothing counts.
  """
  if mask_fn is None:
    return jnp.ones((), bool)
  mask = jnp.asarray(modules.call_with(mask_fn, batch))
  if mask.dtype != bool or not mask.any():
    raise errors.InputError(
      f"mask_fn gives {mask.dtype} {list(mask.shape)} with "
      f"{int(jnp.count_nonzero(mask))} positions that count; give booleans, "
      "False for padding, and some True in every batch"
    )
  return mask


def has_mask(shape: tuple[int, ...], mask: tuple[int, ...]) -> bool:
  """Returns whether the first axes of values are those of a mask.

  Args:
    shape: of the values; more axes, such as the channels, follow.
    mask: shape of the mask.
  """
  return len(shape) > len(mask) and shape[: len(mask)] == mask


def spread_mask(mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns bool of the shape of some values: what counts among them.

  Args:
    mask: bool, of the shape of the values' first axes; of others all values
      count, as they do where it is a single True.
    shape: of the values.
  """
  if not has_mask(shape, mask.shape):
    return jnp.ones(shape, bool)
  more = (1,) * (len(shape) - mask.ndim)
  return jnp.broadcast_to(mask.reshape(*mask.shape, *more), shape)

"""Floats rounded to a smaller type, times a power of two.

The power is the largest under which no number overflows: float16 then has 40
binades for what is smaller, int8 seven bits for the largest, whatever the scale
of a layer. It costs no bit, because it rounds nothing.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

# Of each type, the bits of a whole number, and the least mantissa below 1 that
# is rounded up to 1.
_TYPES = {"float16": (16, 1 - 2**-12), "int8": (7, 1 - 2**-8)}
# A float16 whose largest number is from 2^-8 to 2^16 needs no exponent.
_PLAIN = range(-23, 1)


class Scaled(NamedTuple):
  """An array as a file stores it.

  Attributes:
    numbers: as stored.
    exponent: the array is 2^exponent times what is stored.
    dtype: type of the array in memory.
  """

  numbers: np.ndarray
  exponent: int
  dtype: np.dtype[Any]

  def restore(self) -> np.ndarray:
    """Returns the array in its own type and memory."""
    if self.numbers.dtype == self.dtype and not self.exponent:
      return self.numbers.copy()
    wide = self.numbers.astype(np.result_type(self.dtype, np.float32))
    np.ldexp(wide, self.exponent, out=wide)
    return wide.astype(self.dtype, copy=False)

  def is_finite(self) -> bool:
    """Returns whether all numbers are finite in memory."""
    with np.errstate(over="ignore", invalid="ignore"):
      largest = np.ldexp(_largest(self.numbers), self.exponent)
    return bool(largest <= float(jnp.finfo(self.dtype).max))


def scale(array: np.ndarray, dtype: str) -> Scaled:
  """Rounds finite floats to 'float16' or 'int8' times a power of two.

  What comes back is rounded to the same numbers again.
  """
  return _round(array, dtype, _exponent(array, dtype))


def halve(array: np.ndarray) -> Scaled:
  """Rounds finite floats to float16, with an exponent only where they need it.

  What comes back is rounded to the same numbers again.
  """
  exponent = _exponent(array, "float16")
  return _round(array, "float16", 0 if exponent in _PLAIN else exponent)


def _largest(numbers: np.ndarray) -> float:
  # Not by abs(), which leaves -128 as it is, and takes memory.
  return max(float(numbers.max(initial=0)), -float(numbers.min(initial=0)))


def _exponent(array: np.ndarray, dtype: str) -> int:
  """Returns the least exponent under which no number overflows."""
  mantissa, exponent = math.frexp(_largest(array))
  bits, one = _TYPES[dtype]
  return exponent + (mantissa >= one) - bits


def _round(array: np.ndarray, dtype: str, exponent: int) -> Scaled:
  wide = array.astype(np.result_type(array.dtype, np.float32), copy=False)
  numbers = np.ldexp(wide, -exponent)
  if dtype == "int8":
    numbers = np.rint(numbers)
  # NumPy makes a number of what has no axes.
  return Scaled(np.asarray(numbers).astype(dtype), exponent, array.dtype)

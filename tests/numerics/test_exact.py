"""Inner products, against float64, and one program against another."""

import jax
import numpy as np
import pytest

from pqf_jax.numerics import exact


def _normal(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("length", [1, 2, 4, 9, 18])
def test_it_is_that_of_float64(length):
  left, right = _normal(2, 500, length)
  products = exact.dot(left, right)
  wanted = (left.astype(np.float64) * right).sum(axis=-1)
  bound = 4 * length * 2.0**-24 * np.abs(left * right).sum(axis=-1)
  assert (np.abs(products - wanted) <= bound).all()


@pytest.mark.parametrize("length", [2, 3, 4, 5, 8, 9])
def test_rows_do_not_depend_on_their_number(length):
  # XLA:CPU compiles arrays of 4096 numbers and more in another way.
  vectors = _normal(9, 256, length)
  dot = jax.jit(exact.dot)
  alone = np.stack([dot(row[None], row[None])[0] for row in vectors])
  for count in range(2, 10):
    some = vectors[:count]
    np.testing.assert_array_equal(dot(some, some), alone[:count])

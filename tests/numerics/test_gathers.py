import jax.numpy as jnp
import numpy as np
import pytest

from pqf_jax.numerics import gathers


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("num_rows", "length"), [(1, 1), (256, 9), (2048, 4)])
def test_products_are_the_rows_to_the_bit(num_rows, length, dtype):
  draws = np.random.default_rng(0)
  # All magnitudes that float16 has, and powers of two and their neighbours.
  table = draws.standard_normal((num_rows, length)) * 2.0 ** draws.integers(
    -13, 14, (num_rows, length)
  )
  table[: num_rows // 4] = 2.0 ** np.round(
    np.log2(np.abs(table[: num_rows // 4]))
  )
  table[: num_rows // 8] *= 1 - 2.0**-24
  table = jnp.asarray(table, dtype)
  rows = jnp.asarray(draws.integers(0, num_rows, (7, 11)), jnp.uint16)
  gathered = jnp.moveaxis(gathers.columns(table, rows), 0, -1)
  assert gathered.dtype == dtype
  np.testing.assert_array_equal(gathered, np.asarray(table)[np.asarray(rows)])


def test_magnitudes_of_float32():
  table = np.float32([[1e-30, -1e30], [2e-30, 3e38], [0, -0.1]])
  rows = np.array([2, 1, 0, 1])
  gathered = gathers.columns(jnp.asarray(table), rows)
  np.testing.assert_array_equal(gathered, table[rows].T)

"""Products straight from codes agree with NumPy's product in float64."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from pqf_jax import errors
from pqf_jax.inference import products

FORMS = (0, 10**9)  # crossovers: always by blocks, always by tables


def _case(seed, num_rows, num_positions, length, num_codes, c_out):
  rng = np.random.default_rng(seed)
  inputs = rng.standard_normal((num_rows, num_positions * length))
  codebook = rng.standard_normal((num_codes, length))
  codes = rng.integers(0, num_codes, (num_positions, c_out))
  return (
    inputs.astype(np.float32),
    codebook.astype(np.float32),
    codes.astype(np.min_scalar_type(num_codes - 1)),
  )


def _check(got, inputs, codebook, codes):
  """Compares with float64; errors are relative to the terms of each sum."""
  inputs, codebook = (np.asarray(x, np.float64) for x in (inputs, codebook))
  kernel = codebook[codes].transpose(0, 2, 1).reshape(-1, codes.shape[1])
  bound = 1e-5 * (abs(inputs) @ abs(kernel))
  assert got.dtype == jnp.float32
  assert (abs(np.asarray(got, np.float64) - inputs @ kernel) <= bound).all()


@hypothesis.given(
  seed=st.integers(0, 99),
  num_rows=st.integers(0, 9),
  num_positions=st.sampled_from([1, 2, 7, 12]),
  length=st.sampled_from([1, 4, 8, 9, 16]),
  num_codes=st.sampled_from([1, 3, 256, 300, 4096]),
  c_out=st.integers(1, 40),
  crossover=st.sampled_from([*FORMS, None]),
  dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
@hypothesis.settings(deadline=None, max_examples=25)
def test_products_are_those_of_the_dense_kernel(
  seed, num_rows, num_positions, length, num_codes, c_out, crossover, dtype
):
  inputs, codebook, codes = _case(
    seed, num_rows, num_positions, length, num_codes, c_out
  )
  inputs, codebook = (jnp.asarray(x, dtype) for x in (inputs, codebook))
  got = products.product(
    inputs, codebook, jnp.asarray(codes), crossover=crossover
  )
  _check(got, inputs, codebook, codes)


@pytest.mark.parametrize("num_codes", [1, 256, 257, 2**16, 2**16 + 1])
@pytest.mark.parametrize("num_positions", [1, 4, 7])
def test_codes_come_apart_as_they_were_joined(num_codes, num_positions):
  rng = np.random.default_rng(0)
  codes = rng.integers(0, num_codes, (num_positions, 2, 5))
  codes[-1] = num_codes - 1
  for axis in (0, 1):
    expected = np.moveaxis(codes, 0, axis)
    joined = products.join_codes(expected, num_codes, axis)
    each = 4 // np.min_scalar_type(num_codes - 1).itemsize
    assert joined.shape[axis] == -(-num_positions // each)
    got = products.split_codes(joined, num_codes, num_positions, axis)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("crossover", FORMS)
@pytest.mark.parametrize("num_positions", [211, 240])
def test_loops_of_several_steps(crossover, num_positions, monkeypatch):
  """A prime number of positions leaves one to a step."""
  monkeypatch.setattr(products, "_TABLE_SUMS", 2**8)
  monkeypatch.setattr(products, "_BLOCK_ENTRIES", 2**10)
  inputs, codebook, codes = _case(0, 3, num_positions, 4, 20, 16)
  got = jax.jit(products.product, static_argnames="crossover")(
    inputs, codebook, codes, crossover=crossover
  )
  _check(got, inputs, codebook, codes)


@pytest.mark.parametrize("crossover", FORMS)
def test_what_is_not_finite_stays_in_its_row(crossover):
  inputs, codebook, codes = _case(0, 3, 12, 4, 20, 16)
  inputs[1, 5] = np.inf
  got = products.product(inputs, codebook, codes, crossover=crossover)
  assert not np.isfinite(got[1]).any()
  _check(got[::2], inputs[::2], codebook, codes)


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("crossover", FORMS)
def test_gradients_are_those_of_the_dense_kernel(crossover, num_rows):
  inputs, codebook, codes = _case(1, num_rows, 6, 4, 5, 7)
  weights = np.random.default_rng(2).standard_normal((num_rows, 7))
  _, pullback = jax.vjp(
    lambda *values: products.product(*values, codes, crossover=crossover),
    *map(jnp.asarray, (inputs, codebook)),
  )
  of_inputs, of_codebook = pullback(jnp.asarray(weights, jnp.float32))
  kernel = codebook[codes].transpose(0, 2, 1).reshape(-1, 7)
  of_kernel = (inputs.T @ weights).reshape(6, 4, 7).transpose(0, 2, 1)
  expected = np.zeros(codebook.shape)
  np.add.at(expected, codes, of_kernel)
  np.testing.assert_allclose(of_inputs, weights @ kernel.T, 1e-4, 1e-5)
  np.testing.assert_allclose(of_codebook, expected, 1e-4, 1e-5)


@pytest.mark.parametrize("crossover", FORMS)
def test_a_batch_of_products_is_each_of_them(crossover):
  inputs, codebook, codes = _case(3, 4, 6, 4, 5, 7)

  def run(row):
    return products.product(row[None], codebook, codes, crossover=crossover)[0]

  _check(jax.vmap(run)(jnp.asarray(inputs)), inputs, codebook, codes)


def test_another_number_of_inputs_is_refused():
  inputs, codebook, codes = _case(0, 2, 6, 4, 5, 7)
  with pytest.raises(errors.InputError, match="kernel of 24 inputs"):
    products.product(jnp.asarray(inputs[:, :-4]), codebook, codes)


def test_complex_inputs_are_refused():
  inputs, codebook, codes = _case(0, 2, 6, 4, 5, 7)
  with pytest.raises(errors.InputError, match="type complex64; multiply"):
    products.product(jnp.asarray(inputs, jnp.complex64), codebook, codes)

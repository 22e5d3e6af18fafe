import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from pqf_jax.packing import scaling

TYPES = [jnp.dtype(t) for t in ("bfloat16", "float16", "float32", "float64")]


@st.composite
def arrays(draw):
  """Random floats of any type and scale that the type holds."""
  dtype = draw(st.sampled_from(TYPES))
  rng = np.random.default_rng(draw(st.integers(0, 99)))
  limits = jnp.finfo(dtype)
  exponent = draw(st.integers(limits.minexp, limits.maxexp - 4))
  numbers = rng.normal(size=draw(st.sampled_from([(), (0,), (7,), (3, 5)])))
  return np.asarray(np.ldexp(numbers, exponent)).astype(dtype)


@hypothesis.given(arrays(), st.sampled_from(["int8", "float16"]))
@hypothesis.settings(deadline=None, max_examples=100)
def test_numbers_are_off_by_half_a_step_at_most(array, dtype):
  scaled = scaling.scale(array, dtype)
  exact = np.ldexp(array.astype(np.float64), -scaled.exponent)
  # int8 has steps of 1; of float16, 11 bits, or steps of 2^-24.
  half_steps = 0.5 if dtype == "int8" else np.abs(exact) * 2**-11 + 2**-25
  assert scaled.numbers.dtype == dtype
  assert (np.abs(scaled.numbers - exact) <= half_steps).all()
  largest = np.abs(scaled.numbers.astype(np.float64)).max(initial=0)
  if largest:  # all bits are used
    assert 64 <= largest <= 127 or dtype == "float16"
    assert 2**15 <= largest <= 65504 or dtype == "int8"
  assert scaled.restore().dtype == array.dtype
  assert scaled.is_finite()


@hypothesis.given(arrays(), st.sampled_from(["int8", "float16", "half"]))
@hypothesis.settings(deadline=None, max_examples=100)
def test_rounding_twice_is_rounding_once(array, dtype):

  def store(x):
    return scaling.halve(x) if dtype == "half" else scaling.scale(x, dtype)

  once = store(array)
  twice = store(once.restore())
  assert once.exponent == twice.exponent
  np.testing.assert_array_equal(once.numbers, twice.numbers)


@pytest.mark.parametrize(
  ("largest", "exponent"),
  [
    (0.0, 0),
    (1.0, 0),
    (65504.0, 0),
    (65519.9, 0),
    (65520.0, 1),
    (3.4e38, 112),
    (2**-8, 0),
    (2**-8 * (1 - 2**-13), 0),
    (2**-8 * (1 - 2**-12), 0),
    (2**-9, -24),
    (1e-38, -142),
  ],
)
def test_half_numbers_have_an_exponent_where_they_need_it(largest, exponent):
  array = np.array([-largest, largest / 3], np.float32)
  halved = scaling.halve(array)
  assert halved.exponent == exponent
  np.testing.assert_allclose(halved.restore(), array, rtol=2**-11)


@pytest.mark.parametrize("number", [-128, 127])
def test_every_byte_is_compared_with_the_type(number):
  numbers = np.array([number, 0], np.int8)
  single = np.dtype(np.float32)
  assert scaling.Scaled(numbers, 120, single).is_finite()
  assert scaling.Scaled(numbers, 122, single).is_finite() is False


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_found(number):
  numbers = np.array([number, 0], np.float16)
  assert not scaling.Scaled(numbers, -10, np.dtype(np.float32)).is_finite()

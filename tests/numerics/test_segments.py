import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from pqf_jax.numerics import segments


def _exact(rows, codes, num_segments):
  sums = np.zeros((num_segments, rows.shape[1]))
  np.add.at(sums, codes, rows.astype(np.float64))
  return sums


@hypothesis.given(
  seed=st.integers(0, 2**30),
  count=st.sampled_from([0, 1, 7, 3000]),
  exponent=st.floats(-30, 30),
)
@hypothesis.settings(deadline=None, max_examples=20)
def test_sums_are_those_of_float64(seed, count, exponent):
  draws = np.random.default_rng(seed)
  rows = draws.standard_t(3, (count, 3)) * 10**exponent
  rows = rows.astype(np.float32)
  codes = draws.integers(0, 5, count)
  sums = segments.segment_sum(jnp.asarray(rows), jnp.asarray(codes), 5)
  largest = np.abs(rows).max(axis=0, initial=0)
  exact = _exact(rows, codes, 5)
  slack = count * 2.0**-29 * largest + 2e-7 * np.abs(exact)
  assert (np.abs(sums - exact) <= slack + 1e-38).all()


def test_the_order_of_the_rows_does_not_matter():
  draws = np.random.default_rng(0)
  rows = draws.standard_normal((20000, 4)).astype(np.float32)
  codes = draws.integers(0, 7, 20000)
  order = draws.permutation(20000)
  first = segments.segment_sum(jnp.asarray(rows), jnp.asarray(codes), 7)
  second = segments.segment_sum(
    jnp.asarray(rows[order]), jnp.asarray(codes[order]), 7
  )
  np.testing.assert_array_equal(first, second)


def _scatter(add, num_copies):
  return functools.partial(segments._sums, add, 4, num_copies)


@pytest.mark.parametrize(
  "add_words",
  [
    *(
      _scatter(add, copies)
      for add in (segments._add, segments._add_pairs)
      for copies in (1, 2, 8, 64)
    ),
    lambda words, codes: segments._column_products(4, words.T, codes),
  ],
)
def test_words_are_added_exactly(add_words, monkeypatch):
  monkeypatch.setattr(segments, "_MOST_MULTIPLIED", 1024)
  draws = np.random.default_rng(0)
  low = draws.integers(0, 2**15, (5000, 3))
  high = draws.integers(-(2**14), 2**14, (5000, 3), endpoint=True)
  words = np.stack([low, high], axis=2).reshape(5000, 6)
  codes = draws.integers(0, 4, 5000)
  parts = add_words(jnp.asarray(words, jnp.int32), jnp.asarray(codes))
  total = np.float64(parts[0]) + np.float64(parts[1]) * 2**15
  np.testing.assert_array_equal(total, _exact(words, codes, 4))


def test_sums_that_one_int32_could_not_hold():
  count = 300_000  # all of the largest word, in one segment
  rows = jnp.ones((count, 1)) * (1 - 2**-20)
  sums = segments.segment_sum(rows, jnp.zeros(count, jnp.int32), 1)
  np.testing.assert_allclose(sums, count * (1 - 2**-20), rtol=1e-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_entry_spoils_its_column_only(bad):
  rows = np.ones((10, 2), np.float32)
  rows[3, 0] = bad
  sums = segments.segment_sum(jnp.asarray(rows), jnp.zeros(10, jnp.int32), 2)
  assert np.isnan(sums[:, 0]).all()
  np.testing.assert_array_equal(sums[:, 1], [10, 0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_stays_half_precision(dtype):
  rows = jnp.ones((100, 2), dtype)
  sums = segments.segment_sum(rows, jnp.zeros(100, jnp.int32), 1)
  assert sums.dtype == dtype
  np.testing.assert_array_equal(sums.astype(jnp.float32), [[100, 100]])


def test_works_under_vmap_and_jit():
  rows = jnp.asarray(np.random.default_rng(0).standard_normal((2, 50, 3)))
  codes = jnp.arange(50) % 4
  both = jax.jit(jax.vmap(lambda r: segments.segment_sum(r, codes, 4)))(rows)
  for i in range(2):
    np.testing.assert_array_equal(
      both[i], segments.segment_sum(rows[i], codes, 4)
    )

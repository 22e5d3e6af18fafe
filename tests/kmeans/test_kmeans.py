import functools
import logging

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from pqf_jax import errors, kmeans
from pqf_jax.kmeans.kmeans import random_rows
from tests.kmeans import cases


def _assert_nearest(vectors, codebook, codes):
  """The codes are a float64 argmin, up to pairs that float32 cannot tell."""
  distances = cases.squared_distances(vectors, codebook)
  chosen = np.take_along_axis(distances, np.asarray(codes)[:, None], axis=1)
  slack = 1e-6 * np.ptp(np.concatenate([vectors, codebook])) ** 2
  assert (chosen[:, 0] <= distances.min(axis=1) + slack).all()


@pytest.mark.parametrize("num_steps", [1, cases.T])
def test_result_is_finite_and_consistent(num_steps):
  vectors = cases.normal(cases.N, cases.D, shift=0.05) * np.float32(
    [1, 2, 3, 4]
  )
  result = cases.annealed(jax.random.key(0), vectors, num_steps=num_steps)
  assert result.codebook.shape == (cases.K, cases.D)
  assert result.codebook.dtype == jnp.float32
  assert result.codes.dtype == jnp.int32
  assert result.distortion.shape == (num_steps + 1,)
  assert np.isfinite(result.codebook).all()
  assert np.isfinite(result.distortion).all()
  _assert_nearest(vectors, np.asarray(result.codebook), result.codes)
  residual = np.float64(vectors - np.asarray(result.codebook)[result.codes])
  np.testing.assert_allclose(
    result.distortion[-1], (residual**2).sum(axis=1).mean(), rtol=1e-5
  )
  np.testing.assert_allclose(result.variance, vectors.var(), rtol=1e-5)


@hypothesis.given(
  seed=st.integers(0, 2**30),
  scale=st.floats(1e-6, 1e3),
  shift=st.floats(-2, 2),
  num_distinct=st.integers(1, cases.N),
)
@hypothesis.settings(deadline=None, max_examples=25)
def test_laws_hold_for_repeated_scaled_and_shifted_data(
  seed, scale, shift, num_distinct
):
  shape = num_distinct, cases.D
  distinct = cases.normal(*shape, seed=seed, shift=shift, scale=1)
  vectors = np.resize(distinct * np.float32(scale), (cases.N, cases.D))
  key = jax.random.key(seed)
  lloyd, annealed = cases.lloyd(key, vectors), cases.annealed(key, vectors)
  for result in (lloyd, annealed):
    assert np.isfinite(result.codebook).all()
    _assert_nearest(vectors, np.asarray(result.codebook), result.codes)
  # Rounding of |c|^2 - 2 <x, c> + |x|^2 bounds what a step may seem to lose.
  slack = 1e-5 * np.square(vectors - vectors.mean(axis=0)).sum(axis=1).mean()
  assert (np.diff(lloyd.distortion) <= slack + 1e-12 * scale**2).all()


def test_as_many_codes_as_sub_vectors_give_no_error():
  vectors = cases.normal(cases.K, cases.D, shift=3)
  result = cases.lloyd(jax.random.key(0), vectors)
  assert len(set(np.asarray(result.codes))) == cases.K
  assert result.distortion[-1] < 1e-12


def test_annealing_beats_lloyd():
  vectors = cases.normal(cases.N, cases.D)
  ratios = [
    cases.annealed(key, vectors).distortion[-1]
    / cases.lloyd(key, vectors).distortion[-1]
    for key in cases.split_keys(6)
  ]
  assert np.mean(ratios) < 0.98


def test_random_rows_are_distinct_and_even():
  rows = np.asarray(random_rows(cases.split_keys(2000), [20] * 2000, 5))
  assert all(len(set(row)) == 5 for row in rows)
  frequency = np.bincount(rows.ravel(), minlength=20) / 2000
  np.testing.assert_allclose(frequency, 0.25, atol=0.05)


@pytest.mark.parametrize("count, num_codes", [(7, 7), (10**7, 2048), (5, 1)])
def test_random_rows_of_any_count(count, num_codes):
  rows = np.asarray(random_rows(cases.split_keys(1), [count], num_codes))[0]
  assert (np.diff(rows) > 0).all()
  assert rows.min() >= 0
  assert rows.max() < count


def test_constant_data():
  vectors = np.full((cases.N, cases.D), 0.3, np.float32)
  result = cases.annealed(jax.random.key(0), vectors)
  np.testing.assert_allclose(result.codebook, 0.3, rtol=1e-6)
  np.testing.assert_allclose(result.distortion, 0, atol=1e-12)


def test_one_sub_vector_of_length_one():
  result = kmeans.annealed_kmeans(
    jax.random.key(0), np.ones((1, 1)), num_codes=1, num_steps=3
  )
  np.testing.assert_array_equal(result.codebook, [[1]])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_input_is_computed_in_float32(dtype):
  vectors = jnp.asarray(cases.normal(cases.N, cases.D)).astype(dtype)
  key = jax.random.key(0)
  half = cases.annealed(key, vectors)
  full = cases.annealed(key, vectors.astype(jnp.float32))
  jax.tree.map(np.testing.assert_array_equal, half, full)
  assert half.codebook.dtype == jnp.float32


def test_64_bit_mode_changes_nothing():
  vectors = np.float64(cases.normal(cases.N, cases.D))
  usual = cases.annealed(jax.random.key(0), vectors)
  with jax.enable_x64(True):
    wide = cases.annealed(jax.random.key(0), vectors)
  jax.tree.map(np.testing.assert_array_equal, usual, wide)
  assert [x.dtype for x in usual] == [x.dtype for x in wide]


def test_key_decides_the_result():
  run = functools.partial(
    cases.annealed, vectors=cases.normal(cases.N, cases.D)
  )
  same = run(jax.random.key(1)), run(jax.random.key(1))
  jax.tree.map(np.testing.assert_array_equal, *same)
  assert not np.array_equal(run(jax.random.key(2)).codebook, same[0].codebook)


def test_jit_and_vmap_of_the_caller_change_nothing():
  vectors = jnp.asarray(cases.normal(2, cases.N, cases.D))
  keys = cases.split_keys(2)
  batched = jax.jit(jax.vmap(cases.annealed))(keys, vectors)
  for i in range(2):
    single = cases.annealed(keys[i], vectors[i])
    np.testing.assert_array_equal(batched.codes[i], single.codes)
    np.testing.assert_allclose(batched.codebook[i], single.codebook, atol=1e-7)


def test_a_layer_does_not_depend_on_those_it_shares_a_call_with():
  # Hartigan's rule or not, and more than one tile; the last has as many
  # centroids as sub-vectors.
  counts = 1000, cases.N, 1700, cases.K
  layers = [cases.normal(n, cases.D, seed=n, shift=0.1) for n in counts]
  keys = cases.split_keys(4)
  run = functools.partial(
    kmeans.kmeans_of_layers, num_codes=cases.K, num_steps=cases.T
  )
  together = run(keys, layers)
  back = run(keys[::-1], layers[::-1])[::-1]
  for i, layer in enumerate(layers):
    alone = cases.annealed(keys[i], layer)
    for other in (together[i], back[i]):
      cases.assert_same(alone, other)
      # Sums of |x - c|^2 less |x|^2: they round as the latter do, which shows
      # where as many centroids as sub-vectors leave no error.
      slack = 2**-22 * cases.D * float(alone.variance)  # two roundings
      np.testing.assert_allclose(
        alone.distortion, other.distortion, rtol=1e-6, atol=slack
      )


def test_layers_of_one_shape_share_one_compilation(caplog):
  cases.annealed(jax.random.key(0), cases.normal(cases.N, cases.D))
  with jax.log_compiles(), caplog.at_level(logging.WARNING):
    for seed in range(3):
      vectors = cases.normal(cases.N, cases.D, seed=seed)
      cases.annealed(jax.random.key(seed), vectors)
    assert not caplog.records
    # The log does record a new shape.
    cases.annealed(jax.random.key(0), cases.normal(cases.N + 1, cases.D))
    assert caplog.records


@pytest.mark.parametrize(
  "vectors, num_codes, num_steps, message",
  [
    (cases.normal(10, 9), 11, 1, r"num_codes = 11 with 10 sub-vectors"),
    (cases.normal(10, 9), 0, 1, r"num_codes = 0 .*between 1 and 10"),
    (cases.normal(10, 9), 2, 0, r"num_steps = 0"),
    (cases.normal(10), 2, 1, r"shape \[10\]"),
    (cases.normal(10, 0), 2, 1, r"shape \[10, 0\]"),
    (np.diag([1, 1, np.nan, np.inf]), 2, 1, r"2 of 4 sub-vectors.*row 2"),
    (np.full((4, 9), np.inf), 2, 1, r"4 of 4 sub-vectors.*row 0"),
    (np.full((4, 9), 1e20), 2, 1, r"beyond 1e\+15"),
  ],
)
@pytest.mark.parametrize("run", [kmeans.annealed_kmeans, kmeans.lloyd_kmeans])
def test_bad_input_is_named(run, vectors, num_codes, num_steps, message):
  with pytest.raises(errors.InputError, match=message):
    run(jax.random.key(0), vectors, num_codes=num_codes, num_steps=num_steps)

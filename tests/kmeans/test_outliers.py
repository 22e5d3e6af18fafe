"""A few sub-vectors far from all others take nothing from the rest."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pqf_jax import kmeans
from pqf_jax.kmeans import outliers
from tests.kmeans import cases

FIRST = np.arange(cases.N) < 3


def _ordinary(seed=0):
  return cases.normal(cases.N, cases.D, seed=seed, scale=1, shift=3)


def _row(size):
  vectors = _ordinary()
  vectors[7] = size
  return vectors


def _entry():
  vectors = _ordinary()
  vectors[7, 2] = -1e6
  return vectors


def _rows():
  vectors = _ordinary()
  vectors[FIRST] *= np.float32([[1e3], [1e5], [-1e5]])
  return vectors


def _clump():
  """Eight beside one another, for whom one codeword is enough."""
  vectors = _ordinary()
  vectors[:8] = 1e5 + vectors[:8] / 8
  return vectors


def _errors(vectors, result):
  """Returns each sub-vector's squared error, and asserts the result's laws."""
  squares = cases.squared_distances(vectors, result.codebook)
  chosen = squares[np.arange(len(vectors)), np.asarray(result.codes)]
  slack = 1e-6 * np.square(np.float64(vectors)).sum(axis=1)
  assert (chosen <= squares.min(axis=1) + slack).all()
  np.testing.assert_allclose(
    result.distortion[-1], chosen.mean(), rtol=1e-4, atol=1e-9
  )
  np.testing.assert_allclose(
    result.variance, np.float64(vectors).var(), rtol=1e-6
  )
  assert result.codebook.shape == (cases.K, cases.D)
  assert result.distortion.shape == (cases.T + 1,)
  return chosen


@pytest.mark.parametrize("run", [cases.annealed, cases.lloyd])
@pytest.mark.parametrize(
  "vectors, num_left",
  [
    (_row(1e4), 15),
    (_row(1e12), 15),
    (_entry(), 15),
    (_rows(), 13),
    (_clump(), 15),
  ],
  ids=["row", "huge row", "entry", "rows", "clump"],
)
def test_the_rest_is_quantized_as_if_alone(run, vectors, num_left):
  key = jax.random.key(0)
  far = np.abs(vectors).max(axis=1) > 100
  result = run(key, vectors)
  rest = run(key, vectors[~far], num_codes=num_left)
  chosen = _errors(vectors, result)
  np.testing.assert_allclose(
    chosen[~far].mean(), rest.distortion[-1], rtol=1e-5
  )
  np.testing.assert_array_equal(result.codes[~far], rest.codes)
  assert len(set(np.asarray(result.codes))) == cases.K


@pytest.mark.parametrize("size", [1e4, 1e5])
def test_one_row_among_2000_leaves_64_codes_in_use(size):
  vectors = cases.normal(2001, 4, scale=1)
  vectors[7] = size
  run = functools.partial(
    kmeans.annealed_kmeans, jax.random.key(0), num_codes=64, num_steps=300
  )
  result = run(vectors)
  chosen = cases.squared_distances(vectors, result.codebook)
  chosen = chosen[np.arange(2001), np.asarray(result.codes)]
  assert len(set(np.asarray(result.codes))) == 64
  assert chosen[7] == 0
  assert np.delete(chosen, 7).mean() < 0.63


def test_layers_with_outliers_change_nothing_for_others():
  layers = [_ordinary(1), _row(1e5), _ordinary(2), _row(1e4)]
  keys = cases.split_keys(4)
  together = kmeans.kmeans_of_layers(
    keys, layers, num_codes=cases.K, num_steps=cases.T
  )
  for key, layer, result in zip(keys, layers, together, strict=True):
    cases.assert_same(result, cases.annealed(key, layer))


def test_rows_between_go_to_the_nearest_codeword():
  vectors = _ordinary()
  # The second is no outlier, but far nearer to the first than to the rest.
  vectors[0], vectors[1] = 93, 73
  found = outliers.find([vectors], cases.K)[0]
  np.testing.assert_array_equal(found.rows, [0])
  rest = jnp.asarray(vectors[10:25]), np.zeros(299, np.int32), np.ones(3)
  codes = outliers.join(found, vectors, cases.K, rest)[1]
  np.testing.assert_array_equal(codes[:2], [15, 15])


def test_codewords_that_are_left_over_repeat_the_last():
  vectors = np.zeros((12, cases.D), np.float32)
  vectors[0], vectors[1:3] = 1, [[2], [2]]
  result = kmeans.annealed_kmeans(
    jax.random.key(0), vectors, num_codes=12, num_steps=2
  )
  decoded = np.asarray(result.codebook)[np.asarray(result.codes)]
  np.testing.assert_array_equal(decoded, vectors)


@pytest.mark.parametrize("count", [1, 3, cases.N, 20_000])
def test_heavy_tails_and_other_shapes_have_no_outliers(count):
  rng = np.random.default_rng(0)
  layers = [
    rng.standard_normal((count, cases.D)),
    rng.standard_t(3, (count, cases.D)),
    rng.standard_t(2, (count, cases.D)),
    rng.laplace(size=(count, cases.D)) ** 3,
    rng.standard_normal((count, cases.D)) * [1, 1, 1, 1e5],
    rng.standard_normal((count, cases.D)) + 1e5,
    rng.standard_normal((count, cases.D)) * (rng.random((count, 1)) < 0.3),
    np.zeros((count, cases.D)),
  ]
  layers = [np.float32(layer) for layer in layers]
  assert outliers.find(layers, cases.K) == [None] * len(layers)


def test_more_rows_than_codewords_are_no_outliers():
  vectors = _ordinary()
  vectors[: cases.K] *= 1e4
  assert outliers.find([vectors], cases.K) == [None]
  assert outliers.find([vectors], cases.K + 1) != [None]


def test_tracing_finds_none():
  assert jax.jit(lambda x: outliers.find([x], 16) == [None])(_row(1e5))

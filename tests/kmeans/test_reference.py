"""The plain algorithm: its laws, and that the programs do the same."""

import jax
import numpy as np
import pytest

from pqf_jax.kmeans import annealing, kmeans, reference
from tests.kmeans import cases

STILL = annealing.Method(0.0, 0.0, False)


def test_four_points_by_hand():
  vectors = np.array([[0, 0], [0, 2], [10, 0], [10, 2]], float)
  start = vectors[:2] + [[0, 0], [10, 0]]
  codebook, codes, errors = reference.kmeans(
    vectors, start, np.zeros((2, 2, 2)), annealing.LLOYD, 2
  )
  np.testing.assert_allclose(codebook, [[0, 1], [10, 1]])
  np.testing.assert_array_equal(codes, [0, 0, 1, 1])
  np.testing.assert_allclose(errors, [2, 1, 1])


def test_noise_is_that_of_the_mean_of_noisy_data():
  vectors = np.float64(cases.normal(50, 3, shift=1))
  normals = np.array([[[0.5, -1.25, 2]], [[0, 0, 0]]])
  method = annealing.Method(0.7, 0.0, False, ends_by_hartigan=False)
  _, _, errors = reference.kmeans(vectors, vectors[:1], normals, method, 2)
  # The second error is that of the centroid after the first, noisy step.
  falling = 0.7 * np.sqrt(1 / 2)
  noise = falling * vectors.std(axis=0, ddof=1) * normals[0, 0] / 50**0.5
  want = vectors.var(axis=0).sum() + np.square(noise).sum()
  np.testing.assert_allclose(errors[1], want, rtol=1e-6)


def test_hartigans_steps_go_on_where_lloyd_has_converged():
  vectors, normals = np.float64(cases.normal(128, 9)), np.zeros((180, 16, 9))
  arguments = vectors, vectors[:16], normals
  _, _, lloyd = reference.kmeans(*arguments, annealing.LLOYD, 180)
  assert lloyd[-1] == lloyd[-3]
  _, _, more = reference.kmeans(*arguments, STILL, 200)
  assert len(more) == 201
  assert more[-1] < 0.99 * lloyd[-1]


def _reference(key, vectors, method):
  rows = kmeans.random_rows(key[None], [len(vectors)], cases.K)[0]
  num_annealed = cases.T - method.num_hartigan_steps(cases.T)
  normals = kmeans.draw_normals(key[None], num_annealed, cases.K, cases.D)
  start = np.float64(vectors[np.asarray(rows)])
  return reference.kmeans(
    np.float64(vectors), start, np.float64(normals[:, 0]), method, cases.T
  )


def _same(result, expected):
  codebook, codes, errors = expected
  np.testing.assert_array_equal(result.codes, codes)
  np.testing.assert_allclose(result.codebook, codebook, atol=1e-5)
  np.testing.assert_allclose(result.distortion, errors, rtol=1e-5)


@pytest.mark.parametrize("count", [cases.N, 1700])
def test_annealed_kmeans_is_the_reference(count):
  vectors = cases.normal(count, cases.D, shift=0.3, scale=1)
  method = annealing.method(count, cases.D, cases.K)
  assert method.assigns_by_hartigan == (count == cases.N)
  assert method.momentum == (0.5 if count == cases.N else 0.75)
  key = jax.random.key(0)
  _same(cases.annealed(key, vectors), _reference(key, vectors, method))


def test_lloyd_kmeans_is_the_reference():
  vectors, key = cases.normal(cases.N, cases.D, scale=1), jax.random.key(0)
  expected = _reference(key, vectors, annealing.LLOYD)
  _same(cases.lloyd(key, vectors), expected)


def test_empty_clusters_are_filled_as_by_the_reference():
  vectors = cases.normal(cases.N, cases.D, scale=1)
  start = np.full((cases.K, cases.D), 1e3, np.float32)  # too far to be used
  start[0] = 0
  method = annealing.method(cases.N, cases.D, cases.K)
  normals = np.float32(cases.normal(18, cases.K, cases.D, scale=1))
  normals = np.float32(jax.numpy.asarray(normals, jax.numpy.bfloat16))
  result = cases.fit(vectors, start, normals, method)
  arrays = (np.float64(each) for each in (vectors, start, normals))
  _, _, errors = reference.kmeans(*arrays, method, cases.T)
  # The offsets of new centroids are computed to 1 %.
  np.testing.assert_allclose(result.distortion, errors, rtol=0.05)
  assert len(set(np.asarray(result.codes))) == cases.K
  assert result.distortion[-1] < 0.5 * result.distortion[0]

import numpy as np
import pytest

from pqf_jax.kmeans import annealing


@pytest.mark.parametrize("num_steps", [1, 3, 7, 10, 41, 100, 1000])
def test_schedule_is_finite_and_ends_with_the_mean(num_steps):
  methods = [annealing.Method(a, m, False) for a, m in [(1, 0.5), (0.5, 0.75)]]
  noise, momentum = annealing.make_schedule(num_steps, methods)
  assert noise.shape == momentum.shape == (num_steps, 2)
  assert noise.dtype == momentum.dtype == np.float32
  assert (noise[-1] == 0).all() and (momentum[-1] == 0).all()
  assert (momentum[:-1] == [0.5, 0.75]).all()
  assert (np.diff(noise, axis=0) < 0).all()
  np.testing.assert_array_equal(noise[:, 1], noise[:, 0] / 2)
  np.testing.assert_allclose(
    noise[:, 0] ** 2, 1 - np.arange(1, num_steps + 1) / num_steps, atol=1e-6
  )


def test_method_is_that_of_the_size_of_cells_and_of_clusters():
  methods = [annealing.method(32 * k, d, k) for d, k in [(4, 64), (9, 256)]]
  assert methods == [(0.5, 0.5, True, True), (0.75, 0.5, True, True)]
  assert annealing.method(32 * 256, 18, 256).amplitude == 1  # the paper's
  assert annealing.method(1024 * 64, 18, 64).amplitude == 32**0.45
  rules = [annealing.method(n * 256, 9, 256)[1:3] for n in (47, 48, 99, 100)]
  assert rules == [(0.5, True), (0.5, False), (0.5, False), (0.75, False)]
  assert annealing.HARTIGAN_WEIGHT == 0.5


@pytest.mark.parametrize("num_steps, last", [(9, 0), (10, 1), (1000, 20)])
def test_the_last_tenth_is_hartigans_but_not_lloyds(num_steps, last):
  method = annealing.method(4096, 9, 256)
  assert method.num_hartigan_steps(num_steps) == last
  assert annealing.LLOYD.num_hartigan_steps(num_steps) == 0

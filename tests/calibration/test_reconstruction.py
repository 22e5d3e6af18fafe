"""The search for codes and codebooks against NumPy and brute force."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from pqf_jax.calibration import reconstruction

G, OUT, M, D, K, ROWS = 2, 3, 4, 2, 3, 50
N = M * D
DAMPING = 1e-4


@pytest.fixture
def problem():
  """Inputs whose entries are correlated, a kernel, a codebook and codes."""
  rng = np.random.default_rng(0)
  mixing = rng.normal(size=(G, N, N))
  inputs = np.einsum("pgi,gij->pgj", rng.normal(size=(ROWS, G, N)), mixing)
  kernel = rng.normal(size=(G, OUT, N))
  codebook = rng.normal(size=(K, D))
  codes = rng.integers(0, K, (G, OUT, M))
  return inputs, kernel, codebook, codes


def _damped(inputs):
  gram = np.einsum("pgi,pgj->gij", inputs, inputs)
  mean = np.trace(gram, axis1=1, axis2=2) / N
  return gram + DAMPING * mean[:, None, None] * np.eye(N)


def _error(gram, kernel, codebook, codes):
  left = kernel - codebook[codes].reshape(G, OUT, N)
  return np.einsum("goi,gij,goj->", left, gram, left)


def _arrays(*values):
  return [
    jnp.asarray(
      v,
      jnp.int32
      if np.issubdtype(np.asarray(v).dtype, np.integer)
      else jnp.float32,
    )
    for v in values
  ]


def test_error_is_that_of_the_outputs(problem):
  inputs, kernel, codebook, codes = problem
  moments = reconstruction.input_moments(*_arrays(inputs, inputs, kernel))
  found = reconstruction.reconstruct(
    moments, *_arrays(kernel, codebook, codes), rounds=2, damping=DAMPING
  )
  for fitted, chosen, error in (
    (codebook, codes, found.error_before),
    (found.codebook, found.codes, found.error),
  ):
    quantized = np.asarray(fitted)[np.asarray(chosen)].reshape(G, OUT, N)
    outputs, wanted = (
      np.einsum("pgn,gon->pgo", inputs, k) for k in (quantized, kernel)
    )
    expected = np.sum((outputs - wanted) ** 2) / np.sum(wanted**2)
    np.testing.assert_allclose(error, expected, rtol=1e-2)
  assert found.error < 0.5 * found.error_before


def test_target_makes_up_for_other_inputs(problem):
  inputs, kernel, *_ = problem
  rng = np.random.default_rng(1)
  dense_inputs = inputs + rng.normal(size=inputs.shape)
  moments = reconstruction.input_moments(*_arrays(inputs, dense_inputs, kernel))
  _, target, _ = reconstruction._prepare(
    moments, *_arrays(kernel), 1e-2, length=D
  )
  for g in range(G):
    # Least squares, drawn to the dense kernel by the damping.
    gram = inputs[:, g].T @ inputs[:, g]
    ridge = np.sqrt(1e-2 * np.trace(gram) / N) * np.eye(N)
    wanted = dense_inputs[:, g] @ kernel[g].T
    best, *_ = np.linalg.lstsq(
      np.concatenate([inputs[:, g], ridge]),
      np.concatenate([wanted, ridge @ kernel[g].T]),
      rcond=None,
    )
    np.testing.assert_allclose(target[g].T, best, rtol=1e-3, atol=1e-3)


def test_codebook_is_the_least_squares_solution(problem):
  inputs, kernel, codebook, codes = problem
  gram = _damped(inputs)
  # Columns of the design: what one entry of the codebook does to all outputs.
  root = np.linalg.cholesky(gram)
  design = []
  for entry in range(K * D):
    unit = np.zeros(K * D)
    unit[entry] = 1
    ones = unit.reshape(K, D)[codes].reshape(G, OUT, N)
    design.append(np.einsum("goi,gij->goj", ones, root).ravel())
  wanted = np.einsum("goi,gij->goj", kernel, root).ravel()
  best, *_ = np.linalg.lstsq(np.stack(design, 1), wanted, rcond=None)
  fitted = reconstruction._fit_codebook(*_arrays(gram, kernel, codebook, codes))
  np.testing.assert_allclose(fitted, best.reshape(K, D), rtol=1e-2, atol=1e-3)


def test_unused_codewords_stay(problem):
  inputs, kernel, codebook, codes = problem
  fitted = reconstruction._fit_codebook(
    *_arrays(_damped(inputs), kernel, codebook, codes % (K - 1))
  )
  np.testing.assert_array_equal(fitted[K - 1], np.float32(codebook[K - 1]))


def test_each_code_is_the_best_given_the_others(problem):
  inputs, kernel, codebook, codes = problem
  gram = _damped(inputs)
  improved = np.array(
    reconstruction._choose_codes(*_arrays(gram, kernel, codebook, codes))
  )
  # The same sweep by trying every codeword.
  expected = codes.copy()
  for m, g, o in itertools.product(range(M), range(G), range(OUT)):
    costs = []
    for k in range(K):
      expected[g, o, m] = k
      costs.append(_error(gram, kernel, codebook, expected))
    expected[g, o, m] = np.argmin(costs)
  np.testing.assert_array_equal(improved, expected)


def test_codes_in_order_leave_the_least_error_to_later_blocks(problem):
  inputs, kernel, codebook, codes = problem
  gram = _damped(inputs)
  moments = reconstruction.input_moments(*_arrays(inputs, inputs, kernel))
  _, _, triangle = reconstruction._prepare(
    moments, *_arrays(kernel), DAMPING, length=D
  )
  codes = np.array(
    reconstruction._choose_codes(triangle, *_arrays(kernel, codebook, codes))
  )
  # Brute force: each block takes the codeword after which the blocks that
  # follow, free to have any values, can bring the error lowest.
  for g, o in itertools.product(range(G), range(OUT)):
    fixed = np.zeros(0)
    for m in range(M):
      costs = []
      for k in range(K):
        head = np.concatenate([fixed, codebook[k]])
        gap = kernel[g, o, : len(head)] - head
        later = slice(len(head), N)
        reach = gram[g][later, : len(head)] @ gap
        gained = (
          reach @ np.linalg.solve(gram[g][later, later], reach)
          if len(head) < N
          else 0.0
        )
        costs.append(gap @ gram[g][: len(head), : len(head)] @ gap - gained)
      assert codes[g, o, m] == np.argmin(costs)
      fixed = np.concatenate([fixed, codebook[codes[g, o, m]]])


def test_inputs_of_zeros_are_no_problem(problem):
  _, kernel, codebook, codes = problem
  zeros = jnp.zeros((ROWS, G, N))
  found = reconstruction.reconstruct(
    reconstruction.input_moments(zeros, zeros, *_arrays(kernel)),
    *_arrays(kernel, codebook, codes),
    rounds=1,
    damping=DAMPING,
  )
  assert np.isfinite(found.error) and np.isfinite(found.codebook).all()

import jax.numpy as jnp
import numpy as np
import pytest

from pqf_jax.kmeans import assignment, batching
from pqf_jax.numerics import bf16_split


def _normal(*shape, seed=0):
  draws = np.random.default_rng(seed)
  # Over many powers of two.
  return draws.standard_normal(shape) * 10.0 ** draws.uniform(-6, 6, shape)


@pytest.mark.parametrize("length", [1, 4, 9, 18])
def test_scores_are_as_good_as_those_of_float32(length):
  vectors = _normal(2, 1024, length).astype(np.float32)
  codebooks = _normal(1, 50, length, seed=1).astype(np.float32)
  tables = assignment.score_tables(jnp.asarray(codebooks))
  columns = batching.split_columns(jnp.asarray(vectors))
  left = bf16_split.split_vectors(columns)
  right = bf16_split.split_tables(tables, unit=8)
  assert left.shape == (2, bf16_split.depth(length), 1024)
  assert right.shape == (1, bf16_split.depth(length), 56)
  scores = np.einsum("bwn,wk->bnk", np.float64(left), np.float64(right[0]))
  assert (scores[:, :, 50:] > 1e37).all()
  scores, factors = scores[:, :, :50], np.float64(tables[0])
  want = factors[:, 0] + np.float64(vectors) @ factors[:, 1:].T
  size = np.abs(factors[:, 0]) + np.abs(vectors) @ np.abs(factors[:, 1:].T)
  assert (np.abs(scores - want) <= 2.0**-22 * size).all()


def test_the_parts_add_up_to_the_number():
  values = jnp.asarray(_normal(1000), jnp.float32)
  first, second, third = bf16_split.split(values)
  for part in (first, second, third):
    np.testing.assert_array_equal(part.astype(jnp.bfloat16), part)
  np.testing.assert_array_equal(first + (second + third), values)


def test_the_depth_is_what_a_matrix_unit_takes_at_once():
  depths = [bf16_split.depth(length) for length in (1, 4, 8, 9, 18)]
  assert depths == [32, 32, 64, 64, 128]

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pqf_jax import errors
from pqf_jax.kmeans import assignment
from tests.kmeans import cases

MINIMA = (assignment.running_minimum, assignment.reduced_minimum)


@pytest.mark.parametrize("minimum", MINIMA)
@pytest.mark.parametrize(
  "length, num_codes, num_layers",
  [(1, 1, 1), (4, 8, 2), (9, 37, 3), (18, 5, 1)],
)
def test_both_minima_agree_with_brute_force(
  minimum, length, num_codes, num_layers
):
  arguments, codes = cases.scored(length, num_codes, num_layers, num_tiles=3)
  np.testing.assert_array_equal(jax.jit(minimum)(*arguments), codes)


@pytest.mark.parametrize("length", [2, 3, 4, 5, 8, 9])
def test_a_codebook_is_tabled_alike_beside_others(length):
  # XLA:CPU compiles arrays of 4096 numbers and more in another way.
  codebooks = cases.normal(9, 256, length, scale=1)
  make = jax.jit(assignment.score_tables)
  together = make(codebooks)
  for alone, row in zip(map(make, codebooks[:, None]), together, strict=True):
    np.testing.assert_array_equal(alone[0], row)


def test_equal_distances_go_to_the_lowest_index():
  codebook = np.repeat(cases.normal(3, 9), 20, axis=0)
  codes = assignment.assign(cases.normal(500, 9, seed=1), codebook)
  assert set(np.asarray(codes)) == {0, 20, 40}


@pytest.mark.parametrize("shift", [0, 1, 100])
def test_a_common_offset_costs_no_accuracy(shift):
  vectors = cases.normal(2000, 9, shift=shift)
  codebook = vectors[:64]
  codes = np.asarray(assignment.assign(vectors, codebook))
  np.testing.assert_array_equal(
    codes, cases.squared_distances(vectors, codebook).argmin(axis=1)
  )


def test_a_centroid_far_from_all_others_costs_no_accuracy():
  vectors, codebook = (
    cases.normal(300, 4, scale=1),
    cases.normal(16, 4, scale=1),
  )
  codebook[3] = 1e5
  squares = cases.squared_distances(vectors, codebook)
  codes = np.asarray(assignment.assign(vectors, codebook))
  np.testing.assert_allclose(
    squares[np.arange(300), codes], squares.min(axis=1), rtol=1e-5
  )


def test_assign_names_both_shapes():
  with pytest.raises(errors.InputError, match=r"\[10, 9\].*\[4, 8\]"):
    assignment.assign(jnp.zeros((10, 9)), jnp.zeros((4, 8)))
  with pytest.raises(errors.InputError, match=r"\[0, 9\].*no centroid"):
    assignment.assign(jnp.zeros((10, 9)), jnp.zeros((0, 9)))


@pytest.mark.parametrize("count", [1, 1023, 1024, 1025])
def test_assign_of_any_number_of_sub_vectors(count):
  vectors, codebook = cases.normal(count, 4), cases.normal(7, 4, seed=1)
  codes = assignment.assign(vectors, codebook)
  assert codes.dtype == jnp.int32
  np.testing.assert_array_equal(
    codes, cases.squared_distances(vectors, codebook).argmin(axis=1)
  )


def test_no_matrix_of_all_pairs_is_stored():
  count, length, num_codes = 16384, 4, 2048
  lowered = jax.jit(assignment.assign).lower(
    jax.ShapeDtypeStruct((count, length), jnp.float32),
    jax.ShapeDtypeStruct((num_codes, length), jnp.float32),
  )
  temporary = lowered.compile().memory_analysis().temp_size_in_bytes
  assert temporary < 4 * count * (length + 6) + 100 * num_codes * length

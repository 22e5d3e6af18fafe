"""The kernels for a GPU, where there is one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pqf_jax import kmeans, nvidia
from pqf_jax.kmeans import assignment, batching, hartigan
from pqf_jax.kmeans.backends import hopper_sums
from pqf_jax.numerics import bf16_split, segments

pytestmark = pytest.mark.skipif(
  not nvidia.is_available(), reason="needs an NVIDIA Hopper GPU"
)


def _vectors(*shape, seed=0):
  return np.random.default_rng(seed).standard_t(5, shape).astype(np.float32)


def test_codes_are_those_of_float64():
  for length, num_codes in [(1, 1), (9, 256), (18, 250), (4, 2048), (40, 64)]:
    vectors = _vectors(5000, length)
    codebook = _vectors(num_codes, length, seed=1)
    codes = np.asarray(assignment.assign(vectors, codebook))
    distances = (
      np.square(codebook, dtype=np.float64).sum(axis=1)
      - 2 * vectors.astype(np.float64) @ codebook.T.astype(np.float64)
      + np.square(vectors, dtype=np.float64).sum(axis=1, keepdims=True)
    )
    chosen = np.take_along_axis(distances, codes[:, None], axis=1)[:, 0]
    assert (chosen <= distances.min(axis=1) * (1 + 1e-6) + 1e-6).all()
    assert (codes != distances.argmin(axis=1)).mean() < 1e-3


def test_equal_distances_go_to_the_lowest_index():
  codebook = np.repeat(_vectors(5, 9), 20, axis=0)
  codes = np.asarray(assignment.assign(_vectors(5000, 9, seed=1), codebook))
  assert set(codes) == {0, 20, 40, 60, 80}


def test_hartigans_rule_is_that_of_any_platform():
  for length, num_codes in [(9, 256), (4, 250), (18, 16), (2, 2), (3, 1)]:
    vectors = jnp.asarray(_vectors(2, 4096, length))
    batch = batching.make_batch(tuple(vectors))
    columns = batching.split_columns(batch.tiles)
    norms = sum(jnp.square(column) for column in columns)
    means = jnp.asarray(_vectors(2, num_codes, length, seed=1))
    layers = batch.layout.layers
    codes = assignment.nearest_centroid(columns, means, layers)
    draws = np.random.default_rng(0)
    codes = jnp.where(draws.random(codes.shape) < 0.5, codes, 0)
    counts = draws.integers(1, 9, (2, num_codes)).astype(np.float32)
    for layer in range(2):  # what nothing belongs to is empty
      counts[
        layer,
        np.bincount(codes[layers == layer].ravel(), minlength=num_codes) == 0,
      ] = 0
    arguments = columns, means, jnp.asarray(counts), layers, codes
    for weight in (0.5, 1.0):
      want = hartigan.assign(*arguments, weight=weight)
      by_kernel = hartigan.assign(
        *arguments,
        weight=weight,
        vectors=bf16_split.split_vectors((*columns, norms)),
      )
      assert (by_kernel != want).mean() < 1e-3
      assert num_codes == 1 or (by_kernel != codes).mean() > 0.1


def test_sums_are_exact():
  for num_columns, num_codes in [(11, 256), (20, 250), (6, 2048), (3, 5)]:
    draws = np.random.default_rng(0)
    shape = 7, 1024
    columns = draws.uniform(-1, 1, (num_columns, *shape)).astype(np.float32)
    codes = draws.integers(0, num_codes, shape).astype(np.int32)
    codes[:, :300] = num_codes // 2  # many rows of one segment
    layers = np.array([0, 0, 1, 1, 1, 1, 2], np.int32)
    sums = hopper_sums.sums(
      tuple(jnp.asarray(columns)),
      jnp.asarray(codes),
      jnp.asarray(layers),
      jnp.full((3, num_columns), 2.0**14),
      num_codes,
      num_coarse=0,
    )
    sums = np.asarray(sums).astype(np.int64)
    assert sums.shape == (3, 2 * num_columns, num_codes)
    want = np.zeros((3, num_columns, num_codes), np.int64)
    whole = np.round(columns.astype(np.float64) * 2.0**29).astype(np.int64)
    owners = np.broadcast_to(layers[:, None], shape)
    for column in range(num_columns):
      np.add.at(want[:, column], (owners, codes), whole[column])
    np.testing.assert_array_equal(sums[:, 0::2] + (sums[:, 1::2] << 15), want)


def test_a_layer_does_not_depend_on_those_it_shares_a_call_with():
  # Below 3072 sub-vectors steps assign by Hartigan's rule.
  layers = [_vectors(n, 9, seed=n) for n in (300_000, 5000, 64, 2048)]
  keys = jax.random.split(jax.random.key(0), 4)
  run = functools.partial(kmeans.kmeans_of_layers, num_codes=64, num_steps=20)
  together, again = run(keys, layers), run(keys, layers)
  back = run(keys[::-1], layers[::-1])[::-1]
  for i, layer in enumerate(layers):
    alone = kmeans.annealed_kmeans(keys[i], layer, num_codes=64, num_steps=20)
    for other in (together[i], again[i], back[i]):
      np.testing.assert_array_equal(alone.codes, other.codes)
      np.testing.assert_array_equal(alone.codebook, other.codebook)


def test_the_error_is_that_of_the_codes():
  vectors = _vectors(20_000, 9)
  result = kmeans.annealed_kmeans(
    jax.random.key(0), vectors, num_codes=256, num_steps=50
  )
  residual = vectors - np.asarray(result.codebook)[np.asarray(result.codes)]
  error = np.square(residual, dtype=np.float64).sum(axis=1).mean()
  np.testing.assert_allclose(result.distortion[-1], error, rtol=1e-5)
  # The traced error is computed from sums, the last one from residuals.
  np.testing.assert_allclose(*result.distortion[-2:], rtol=0.02)


def test_vmap_of_the_caller_changes_nothing():
  vectors = jnp.asarray(_vectors(3, 3000, 9))
  keys = jax.random.split(jax.random.key(0), 3)
  run = functools.partial(kmeans.annealed_kmeans, num_codes=16, num_steps=4)
  batched = jax.jit(jax.vmap(run))(keys, vectors)
  for i in range(3):
    single = run(keys[i], vectors[i])
    np.testing.assert_array_equal(batched.codes[i], single.codes)
    np.testing.assert_allclose(batched.codebook[i], single.codebook, atol=1e-6)


def test_no_matrix_of_all_pairs_is_stored():
  count, length, num_codes = 131072, 4, 1024
  assign = jax.jit(assignment.assign).lower(
    jax.ShapeDtypeStruct((count, length), jnp.float32),
    jax.ShapeDtypeStruct((num_codes, length), jnp.float32),
  )
  temporary = assign.compile().memory_analysis().temp_size_in_bytes
  assert temporary < count * 150


def test_integer_words_of_a_scatter_agree_with_the_kernel():
  vectors = _vectors(4096, 2)
  codes = np.random.default_rng(1).integers(0, 10, 4096).astype(np.int32)
  sums = segments.segment_sum(jnp.asarray(vectors), jnp.asarray(codes), 10)
  columns = tuple(jnp.asarray(vectors.T.reshape(2, 4, 1024)))
  scale = segments.power_of_two(jnp.abs(vectors).max(axis=0))
  words = hopper_sums.sums(
    columns,
    jnp.asarray(codes.reshape(4, 1024)),
    jnp.zeros(4, jnp.int32),
    2.0**14 / scale[None],
    10,
    num_coarse=0,
  )
  high, low = np.float64(words[0, 1::2]), np.float64(words[0, 0::2])
  want = (high + low * 2.0**-15) * np.asarray(scale)[:, None] * 2.0**-14
  np.testing.assert_allclose(sums, want.T, rtol=1e-6, atol=1e-6)

import functools
import logging
import os
import pathlib
import subprocess
import sys

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from pqf_jax import errors, kmeans
from pqf_jax.kmeans import annealing, batching, iteration, loop


def _normal(*shape, seed=0, scale=0.02, shift=0.0):
  draws = np.random.default_rng(seed).standard_normal(shape)
  return (draws * scale + shift).astype(np.float32)


def _squared_distances(vectors, codebook):
  vectors, codebook = np.float64(vectors), np.float64(codebook)
  return ((vectors[:, None] - codebook[None]) ** 2).sum(axis=2)


def _assert_nearest(vectors, codebook, codes):
  """The codes are a float64 argmin, up to pairs that float32 cannot tell."""
  distances = _squared_distances(vectors, codebook)
  chosen = np.take_along_axis(distances, np.asarray(codes)[:, None], axis=1)
  slack = 1e-6 * np.ptp(np.concatenate([vectors, codebook])) ** 2
  assert (chosen[:, 0] <= distances.min(axis=1) + slack).all()


def _fit(vectors, start, noise, normals, *, momentum=0.0, **options):
  """The loop for one layer, from a given start and given normal numbers."""
  packed = batching.pack([jnp.asarray(vectors)])
  schedule = annealing.Schedule(
    np.float32(noise)[:, None], np.full((len(noise), 1), momentum, np.float32)
  )
  fitted = loop.fit(
    packed,
    jnp.asarray(start)[None],
    schedule,
    jnp.asarray(normals, jnp.bfloat16)[:, None],
    options=iteration.Options(packed.blocks[:, :, 0].size, **options),
  )
  return kmeans.KMeansResult(
    fitted.codebooks[0],
    fitted.codes.reshape(-1)[: len(vectors)],
    fitted.distortion[0],
    fitted.variance[0],
  )


def _numpy_lloyd(vectors, codebook, num_steps):
  trace = []
  for _ in range(num_steps):
    distances = _squared_distances(vectors, codebook)
    codes = distances.argmin(axis=1)
    trace.append(distances.min(axis=1).mean())
    codebook = np.stack(
      [vectors[codes == j].mean(axis=0) for j in range(len(codebook))]
    )
  distances = _squared_distances(vectors, codebook)
  trace.append(distances.min(axis=1).mean())
  return codebook, distances.argmin(axis=1), trace


def test_four_points_by_hand():
  vectors = np.array([[0, 0], [0, 2], [10, 0], [10, 2]], np.float32)
  start, normals = vectors[:2] + [[0, 0], [10, 0]], np.zeros((2, 2, 2))
  result = _fit(
    vectors,
    start.astype(np.float32),
    np.zeros(2, np.float32),
    normals.astype(np.float32),
  )
  np.testing.assert_allclose(result.codebook, [[0, 1], [10, 1]], atol=1e-6)
  np.testing.assert_array_equal(result.codes, [0, 0, 1, 1])
  np.testing.assert_allclose(result.distortion, [2, 1, 1], rtol=1e-6)


def test_lloyd_agrees_with_numpy():
  vectors, schedule = _normal(1000, 4, shift=0.1), np.zeros(5, np.float32)
  start = vectors[:16]
  result = _fit(vectors, start, schedule, _normal(5, 16, 4))
  codebook, codes, trace = _numpy_lloyd(vectors, start, 5)
  np.testing.assert_allclose(result.codebook, codebook, atol=1e-6)
  np.testing.assert_array_equal(result.codes, codes)
  np.testing.assert_allclose(result.distortion, trace, rtol=1e-5)


def test_noise_is_that_of_the_mean_of_noisy_data():
  vectors = _normal(50, 3, shift=1)
  normals = np.float32([[[0.5, -1.25, 2]]])
  amount = np.float32([0.7])
  result = _fit(vectors, vectors[:1], amount, normals)
  want = (
    vectors.mean(axis=0)
    + 0.7 * vectors.std(axis=0, ddof=1) * normals[0, 0] / 50**0.5
  )
  np.testing.assert_allclose(result.codebook[0], want, rtol=1e-5)


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


@pytest.mark.parametrize("momentum", [0.5, 0.75])
def test_momentum_is_that_of_numpy(momentum):
  vectors = _normal(1000, 4, shift=0.1)
  start = centroids = vectors[:16]
  velocity, noise = 0, np.zeros(5)
  for _ in noise:
    codes = _squared_distances(vectors, centroids).argmin(axis=1)
    means = np.stack([vectors[codes == j].mean(axis=0) for j in range(16)])
    ahead = means + momentum * (means - centroids + velocity)
    centroids, velocity = ahead, ahead - centroids
  result = _fit(vectors, start, noise, np.zeros((5, 16, 4)), momentum=momentum)
  np.testing.assert_allclose(result.codebook, centroids, atol=1e-6)


def test_steps_by_transfers_are_those_of_numpy():
  vectors = _normal(300, 4, shift=0.1)
  centroids, counts, codes = vectors[:16], np.full(16, 300 / 16), None
  for _ in range(5):
    distances = _squared_distances(vectors, centroids)
    costs = distances * counts / (counts + 0.5)
    own = distances.argmin(axis=1) if codes is None else codes
    rows = np.arange(300)
    costs[rows, own] = (distances * counts / (counts - 0.5))[rows, own]
    codes = costs.argmin(axis=1)
    counts = np.bincount(codes, minlength=16)
    centroids = np.stack([vectors[codes == j].mean(axis=0) for j in range(16)])
  result = _fit(
    vectors, vectors[:16], np.zeros(5), np.zeros((5, 16, 4)), num_own_blocks=1
  )
  np.testing.assert_allclose(result.codebook, centroids, atol=1e-6)
  nearest = _fit(vectors, vectors[:16], np.zeros(5), np.zeros((5, 16, 4)))
  assert np.abs(result.codebook - nearest.codebook).max() > 1e-4


def test_transfers_go_on_where_lloyd_has_converged():
  vectors, noise, normals = _normal(128, 9), np.zeros(40), np.zeros((40, 16, 9))
  lloyd = _fit(vectors, vectors[:16], noise, normals)
  assert lloyd.distortion[-2] == lloyd.distortion[-3]
  more = _fit(vectors, vectors[:16], noise, normals, num_transfers=20)
  assert more.distortion.shape == (61,)
  assert more.distortion[-1] < 0.99 * lloyd.distortion[-1]
  _assert_nearest(vectors, np.asarray(more.codebook), more.codes)


@pytest.mark.parametrize("num_steps", [1, 10, 1000])
def test_result_is_finite_and_consistent(num_steps):
  vectors = _normal(400, 9)
  result = kmeans.annealed_kmeans(
    jax.random.key(0), vectors, num_codes=32, num_steps=num_steps
  )
  assert result.codebook.shape == (32, 9)
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


@hypothesis.given(
  seed=st.integers(0, 2**30),
  scale=st.floats(1e-6, 1e3),
  shift=st.floats(-2, 2),
  num_distinct=st.integers(1, 120),
)
@hypothesis.settings(deadline=None, max_examples=25)
def test_laws_hold_for_repeated_scaled_and_shifted_data(
  seed, scale, shift, num_distinct
):
  distinct = _normal(num_distinct, 4, seed=seed, shift=shift, scale=1)
  vectors = np.resize(distinct * np.float32(scale), (120, 4))
  key = jax.random.key(seed)
  run = functools.partial(kmeans.lloyd_kmeans, num_codes=16, num_steps=8)
  lloyd, annealed = (
    run(key, vectors),
    kmeans.annealed_kmeans(key, vectors, num_codes=16, num_steps=8),
  )
  for result in (lloyd, annealed):
    assert np.isfinite(result.codebook).all()
    _assert_nearest(vectors, np.asarray(result.codebook), result.codes)
  # Rounding of |c|^2 - 2 <x, c> + |x|^2 bounds what a step may seem to lose.
  slack = 1e-5 * np.square(vectors - vectors.mean(axis=0)).sum(axis=1).mean()
  assert (np.diff(lloyd.distortion) <= slack + 1e-12 * scale**2).all()


def test_as_many_codes_as_sub_vectors_give_no_error():
  vectors = _normal(64, 9, shift=3)
  result = kmeans.lloyd_kmeans(
    jax.random.key(0), vectors, num_codes=64, num_steps=4
  )
  assert len(set(np.asarray(result.codes))) == 64
  assert result.distortion[-1] < 1e-12


def test_annealing_beats_lloyd():
  vectors = _normal(4096, 9)
  for seed in range(2):
    final = [
      run(
        jax.random.key(seed), vectors, num_codes=256, num_steps=60
      ).distortion[-1]
      for run in (kmeans.annealed_kmeans, kmeans.lloyd_kmeans)
    ]
    assert final[0] < 0.97 * final[1]


def test_random_rows_are_distinct_and_even():
  keys = jax.random.split(jax.random.key(0), 2000)
  rows = np.asarray(kmeans.random_rows(keys, [20] * 2000, 5))
  assert all(len(set(row)) == 5 for row in rows)
  frequency = np.bincount(rows.ravel(), minlength=20) / 2000
  np.testing.assert_allclose(frequency, 0.25, atol=0.05)


@pytest.mark.parametrize("count, num_codes", [(7, 7), (10**7, 2048), (5, 1)])
def test_random_rows_of_any_count(count, num_codes):
  key = jax.random.key(0)
  rows = np.asarray(kmeans.random_rows(key[None], [count], num_codes))[0]
  assert (np.diff(rows) > 0).all()
  assert rows.min() >= 0
  assert rows.max() < count


def test_empty_clusters_are_filled():
  vectors = _normal(300, 9)
  start = np.full((16, 9), 1e3, np.float32)  # too far away to be used
  start[0] = 0
  schedule, normals = np.zeros(4, np.float32), _normal(4, 16, 9, scale=1)
  result = _fit(vectors, start, schedule, normals)
  assert len(set(np.asarray(result.codes))) == 16
  assert result.distortion[-1] < 0.75 * result.distortion[0]


@pytest.mark.parametrize("num_codes", [1, 16])
def test_constant_data(num_codes):
  vectors = np.full((300, 9), 0.3, np.float32)
  result = kmeans.annealed_kmeans(
    jax.random.key(0), vectors, num_codes=num_codes, num_steps=4
  )
  np.testing.assert_allclose(result.codebook, 0.3, rtol=1e-6)
  np.testing.assert_allclose(result.distortion, 0, atol=1e-12)


def test_one_sub_vector_of_length_one():
  result = kmeans.annealed_kmeans(
    jax.random.key(0), np.ones((1, 1)), num_codes=1, num_steps=3
  )
  np.testing.assert_array_equal(result.codebook, [[1]])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_input_is_computed_in_float32(dtype):
  vectors = jnp.asarray(_normal(300, 9)).astype(dtype)
  run = functools.partial(
    kmeans.annealed_kmeans, jax.random.key(0), num_codes=16, num_steps=4
  )
  half, full = run(vectors), run(vectors.astype(jnp.float32))
  jax.tree.map(np.testing.assert_array_equal, half, full)
  assert half.codebook.dtype == jnp.float32


def test_64_bit_mode_changes_nothing():
  vectors = np.float64(_normal(300, 9))
  run = functools.partial(
    kmeans.annealed_kmeans, jax.random.key(0), num_codes=16, num_steps=20
  )
  usual = run(vectors)
  with jax.enable_x64(True):
    wide = run(vectors)
  jax.tree.map(np.testing.assert_array_equal, usual, wide)
  assert [x.dtype for x in usual] == [x.dtype for x in wide]


def test_key_decides_the_result():
  run = functools.partial(
    kmeans.annealed_kmeans, vectors=_normal(300, 9), num_codes=16, num_steps=4
  )
  same = run(jax.random.key(1)), run(jax.random.key(1))
  jax.tree.map(np.testing.assert_array_equal, *same)
  assert not np.array_equal(run(jax.random.key(2)).codebook, same[0].codebook)


def test_jit_and_vmap_of_the_caller_change_nothing():
  vectors = jnp.asarray(_normal(3, 300, 9))
  keys = jax.random.split(jax.random.key(0), 3)
  run = functools.partial(kmeans.annealed_kmeans, num_codes=16, num_steps=20)
  single = [run(keys[i], vectors[i]) for i in range(3)]
  batched = jax.jit(jax.vmap(run))(keys, vectors)
  for i in range(3):
    np.testing.assert_array_equal(batched.codes[i], single[i].codes)
    np.testing.assert_allclose(
      batched.codebook[i], single[i].codebook, atol=1e-7
    )


@pytest.mark.parametrize("num_steps", [1, 22])
def test_a_layer_does_not_depend_on_those_it_shares_a_call_with(num_steps):
  counts = 1000, 5000, 64, 2048, 7000
  layers = [_normal(n, 9, seed=n, shift=0.1) for n in counts]
  keys = jax.random.split(jax.random.key(0), 5)
  run = functools.partial(
    kmeans.kmeans_of_layers, num_codes=64, num_steps=num_steps
  )
  together = run(keys, layers)
  back = run(keys[::-1], layers[::-1])[::-1]
  for i, layer in enumerate(layers):
    alone = kmeans.annealed_kmeans(
      keys[i], layer, num_codes=64, num_steps=num_steps
    )
    for other in (together[i], back[i]):
      np.testing.assert_array_equal(alone.codes, other.codes)
      np.testing.assert_array_equal(alone.codebook, other.codebook)
      # Sums of |x - c|^2 less |x|^2: they round as the latter do, which shows
      # where as many centroids as sub-vectors leave no error.
      slack = 2**-22 * 9 * float(alone.variance)  # two roundings
      np.testing.assert_allclose(
        alone.distortion, other.distortion, rtol=1e-6, atol=slack
      )


def test_method_is_that_of_the_size_of_cells_and_of_clusters():
  methods = [annealing.method(32 * k, d, k) for d, k in [(4, 64), (9, 256)]]
  assert methods == [(0.5, 0.5, True, True), (0.75, 0.5, True, True)]
  assert annealing.method(32 * 256, 18, 256).amplitude == 1  # the paper's
  assert annealing.method(1024 * 64, 18, 64).amplitude == 32**0.45
  rules = [annealing.method(n * 256, 9, 256)[1:3] for n in (47, 48, 99, 100)]
  assert rules == [(0.5, True), (0.5, False), (0.5, False), (0.75, False)]


def test_variance_is_that_of_all_entries():
  vectors = _normal(3000, 4, shift=0.05) * np.float32([1, 2, 3, 4])
  result = kmeans.lloyd_kmeans(
    jax.random.key(0), vectors, num_codes=4, num_steps=1
  )
  np.testing.assert_allclose(result.variance, vectors.var(), rtol=1e-5)


def test_layers_of_one_shape_share_one_compilation(caplog):
  run = functools.partial(kmeans.annealed_kmeans, num_codes=13, num_steps=6)
  run(jax.random.key(0), _normal(211, 9))
  with jax.log_compiles(), caplog.at_level(logging.WARNING):
    for seed in range(3):
      run(jax.random.key(seed), _normal(211, 9, seed=seed))
    assert not caplog.records
    run(jax.random.key(0), _normal(212, 9))  # the log does record a new shape
    assert any("Compiling" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize(
  "vectors, num_codes, num_steps, message",
  [
    (_normal(10, 9), 11, 1, r"num_codes = 11 with 10 sub-vectors"),
    (_normal(10, 9), 0, 1, r"num_codes = 0 .*between 1 and 10"),
    (_normal(10, 9), 2, 0, r"num_steps = 0"),
    (_normal(10), 2, 1, r"shape \[10\]"),
    (_normal(10, 0), 2, 1, r"shape \[10, 0\]"),
    (np.diag([1, 1, np.nan, np.inf]), 2, 1, r"2 of 4 sub-vectors.*row 2"),
    (np.full((4, 9), np.inf), 2, 1, r"4 of 4 sub-vectors.*row 0"),
    (np.full((4, 9), 1e20), 2, 1, r"beyond 1e\+15"),
  ],
)
@pytest.mark.parametrize("run", [kmeans.annealed_kmeans, kmeans.lloyd_kmeans])
def test_bad_input_is_named(run, vectors, num_codes, num_steps, message):
  with pytest.raises(errors.InputError, match=message):
    run(jax.random.key(0), vectors, num_codes=num_codes, num_steps=num_steps)


_SHARDED = """
import functools
import jax, numpy as np
from pqf_jax.ops import kmeans, nearest
vectors = np.random.default_rng(0).standard_normal((20000, 9)).astype("float32")
run = lambda x, **options: kmeans.annealed_kmeans(
  jax.random.key(0), x, num_codes=64, num_steps=20, **options)
one = run(vectors)
for count in (1, 2, 8):
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:count]), ("n",))
  many = run(vectors, mesh=mesh)
  assert len(many.codes) == 20000
  np.testing.assert_array_equal(one.codes, many.codes)
  np.testing.assert_array_equal(one.codebook, many.codebook)
  np.testing.assert_allclose(one.distortion, many.distortion, rtol=1e-6)
layers = [vectors, vectors[:3000], vectors[3000:16000], vectors[:64]]
several = functools.partial(
  kmeans.kmeans_of_layers, jax.random.split(jax.random.key(0), 4), layers,
  num_codes=64, num_steps=20)
for here, there in zip(several(), several(mesh=mesh), strict=True):
  np.testing.assert_array_equal(here.codes, there.codes)
  np.testing.assert_array_equal(here.codebook, there.codebook)
rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("n"))
split = jax.device_put(vectors[:16384], rows)
assert len(split.sharding.device_set) == 8
whole = run(vectors[:16384])
np.testing.assert_array_equal(run(split).codes, whole.codes)
np.testing.assert_array_equal(run(split, mesh=mesh).codes, whole.codes)
everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
copied = run(jax.device_put(vectors[:16384], everywhere))
assert len(copied.codes.sharding.device_set) == 1
np.testing.assert_array_equal(copied.codes, whole.codes)
np.testing.assert_array_equal(
  nearest.assign(split, one.codebook),
  nearest.assign(vectors[:16384], one.codebook))
"""


@pytest.mark.slow
def test_one_two_and_eight_devices_give_the_same_bits():
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
  }
  subprocess.run(
    [sys.executable, "-c", _SHARDED], env=environment, check=True, timeout=120
  )

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu

from pqf_jax import errors
from pqf_jax.kmeans import annealing, assignment, batching, iteration, loop
from pqf_jax.kmeans.backends import hopper_nearest, hopper_sums
from pqf_jax.numerics import bf16_split

FORMS = (assignment.running_minimum, assignment.reduced_minimum)


needs_new_jax = pytest.mark.skipif(
  jax.__version_info__ < hopper_nearest.FIRST_JAX, reason="the kernel needs it"
)


def _normal(*shape, seed=0, scale=0.02, shift=0.0):
  draws = np.random.default_rng(seed).standard_normal(shape)
  return (draws * scale + shift).astype(np.float32)


def _squared_distances(vectors, codebook):
  vectors, codebook = np.float64(vectors), np.float64(codebook)
  return ((vectors[:, None] - codebook[None]) ** 2).sum(axis=2)


def _case(length, num_codes, num_layers, num_blocks):
  """(columns, tables, layers) and the codes that brute force finds."""
  vectors = _normal(num_blocks, 1024, length)
  codebooks = _normal(num_layers, num_codes, length, seed=1)
  layers = np.sort(np.arange(num_blocks) % num_layers).astype(np.int32)
  squares = np.square(codebooks).sum(axis=2, keepdims=True)
  tables = np.concatenate([squares, -2 * codebooks], axis=2)
  columns = assignment.split_columns(jnp.asarray(vectors))
  codes = [
    _squared_distances(block, codebooks[layer]).argmin(axis=1)
    for block, layer in zip(vectors, layers, strict=True)
  ]
  return (columns, jnp.asarray(tables), jnp.asarray(layers)), np.stack(codes)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
  "length, num_codes, num_layers",
  [(1, 1, 1), (4, 8, 2), (9, 37, 3), (18, 5, 1)],
)
def test_both_forms_agree_with_brute_force(form, length, num_codes, num_layers):
  arguments, codes = _case(length, num_codes, num_layers, num_blocks=3)
  np.testing.assert_array_equal(jax.jit(form)(*arguments), codes)


@pytest.fixture(params=[1, 132])
def num_processors(request, monkeypatch):
  """Of a GPU: few blocks are divided among many."""
  monkeypatch.setattr(hopper_nearest, "_NUM_PROCESSORS", request.param)


@needs_new_jax
@pytest.mark.usefixtures("num_processors")
@pytest.mark.parametrize(
  "length, num_codes, num_layers, num_warpgroups",
  [(4, 37, 2, 2), (18, 128, 1, 4), (2, 300, 1, 1)],
)
def test_the_kernel_agrees_with_brute_force(
  length, num_codes, num_layers, num_warpgroups
):
  (columns, tables, layers), codes = _case(
    length, num_codes, num_layers, num_blocks=2
  )
  found = hopper_nearest.nearest(
    bf16_split.of_vectors(columns),
    tables,
    layers,
    num_warpgroups=num_warpgroups,
    interpret=mosaic_gpu.InterpretGPUParams(),
  )
  np.testing.assert_array_equal(found, codes)


@needs_new_jax
@pytest.mark.usefixtures("num_processors")
@pytest.mark.parametrize("num_codes", [37, 128])
def test_the_kernel_passes_over_what_it_is_told(num_codes):
  (columns, tables, layers), codes = _case(4, num_codes, 2, num_blocks=2)
  others = np.random.default_rng(0).integers(0, num_codes, codes.shape)
  own = np.where(others % 2, codes, others).astype(np.int32)
  found = hopper_nearest.nearest(
    bf16_split.of_vectors(columns),
    tables,
    layers,
    jnp.asarray(own),
    interpret=mosaic_gpu.InterpretGPUParams(),
  )
  vectors = np.stack(columns, axis=2).astype(np.float64)
  factors = np.float64(tables[layers])
  scores = factors[:, None, :, 0] + vectors @ factors[:, :, 1:].mT
  np.put_along_axis(scores, own[:, :, None], np.inf, axis=2)
  np.testing.assert_array_equal(found, scores.argmin(axis=2))


@needs_new_jax
def test_the_kernels_compile_for_a_gpu_without_one():
  for length, num_codes in [(1, 1), (9, 256), (18, 256), (4, 2048), (9, 1000)]:
    assert hopper_nearest.fits(length, num_codes)
    assert hopper_sums.fits(length + 2, num_codes)
    (columns, _, layers), _ = _case(length, 1, 1, num_blocks=2)

    def kernels(vectors, tables, layers, *columns):
      codes = hopper_nearest.nearest(vectors, tables, layers)
      codes = hopper_nearest.nearest(vectors, tables, layers, codes)
      units = jnp.ones((1, len(columns)))
      return hopper_sums.sums(columns, codes, layers, units, tables.shape[1])

    traced = jax.jit(kernels).trace(
      bf16_split.of_vectors(columns),
      jnp.zeros((1, num_codes, length + 1)),
      layers,
      *columns,
    )
    lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("mosaic_gpu_v2") == 3


def test_a_codebook_that_exceeds_shared_memory_does_not_fit():
  assert not hopper_nearest.fits(18, 1024)
  assert not hopper_sums.fits(20, 2048)


@pytest.mark.parametrize("length", [2, 3, 4, 5, 8, 9])
def test_a_codebook_is_tabled_alike_beside_others(length):
  # XLA:CPU compiles arrays of 4096 numbers and more in another way.
  draws = np.random.default_rng(0).normal(size=(9, 256, length))
  codebooks = draws.astype(np.float32)
  make = jax.jit(assignment.tables)
  together = make(codebooks)
  for alone, row in zip(map(make, codebooks[:, None]), together, strict=True):
    np.testing.assert_array_equal(alone[0], row)


def test_equal_distances_go_to_the_lowest_index():
  codebook = np.repeat(_normal(3, 9), 20, axis=0)
  codes = np.asarray(assignment.assign(_normal(500, 9, seed=1), codebook))
  assert set(codes) == {0, 20, 40}


@pytest.mark.parametrize("shift", [0, 1, 100])
def test_a_common_offset_costs_no_accuracy(shift):
  vectors = _normal(2000, 9, shift=shift)
  codebook = vectors[:64]
  codes = np.asarray(assignment.assign(vectors, codebook))
  np.testing.assert_array_equal(
    codes, _squared_distances(vectors, codebook).argmin(axis=1)
  )


def test_assign_names_both_shapes():
  with pytest.raises(errors.InputError, match=r"\[10, 9\].*\[4, 8\]"):
    assignment.assign(jnp.zeros((10, 9)), jnp.zeros((4, 8)))
  with pytest.raises(errors.InputError, match=r"\[0, 9\].*no centroid"):
    assignment.assign(jnp.zeros((10, 9)), jnp.zeros((0, 9)))


def test_assign_of_any_number_of_sub_vectors():
  for count in (1, 1023, 1024, 1025):
    vectors, codebook = _normal(count, 4), _normal(7, 4, seed=1)
    codes = assignment.assign(vectors, codebook)
    assert codes.dtype == jnp.int32
    np.testing.assert_array_equal(
      codes, _squared_distances(vectors, codebook).argmin(axis=1)
    )


@pytest.mark.parametrize("length, num_codes", [(9, 256), (4, 2048)])
def test_no_matrix_of_all_pairs_is_stored(length, num_codes):
  count = 16384
  vectors = jax.ShapeDtypeStruct((count, length), jnp.float32)
  codebook = jax.ShapeDtypeStruct((num_codes, length), jnp.float32)
  packed = jax.eval_shape(lambda v: batching.pack([v]), vectors)
  normals = jax.ShapeDtypeStruct((3, 1, num_codes, length), jnp.bfloat16)
  options = iteration.Options(most_rows=count, num_transfers=2)
  fit = jax.jit(loop.fit, static_argnames="options").lower(
    packed,
    jax.ShapeDtypeStruct((1, num_codes, length), jnp.float32),
    annealing.make_schedule(3, [annealing.method(count, length, num_codes)]),
    normals,
    options=options,
  )
  assign = jax.jit(assignment.assign).lower(vectors, codebook)
  for lowered, rows in [(assign, length + 6), (fit, 10 * length + 20)]:
    temporary = lowered.compile().memory_analysis().temp_size_in_bytes
    assert temporary < 4 * count * rows + 100 * num_codes * length
    assert temporary < 4 * count * num_codes / 2

"""The kernel for NVIDIA Hopper: its program, its plans, and where it serves."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pqf_jax import inference, nvidia
from pqf_jax.inference import apply, hopper, hopper_source, products
from tests.inference import coded, ptx

needs_new_jax = pytest.mark.skipif(
  jax.__version_info__ < nvidia.FIRST_JAX, reason="the kernel needs it"
)
needs_hopper = pytest.mark.skipif(
  not nvidia.is_available(), reason="needs an NVIDIA Hopper GPU"
)


def _case(num_rows, num_positions, c_out, num_codes, length, dtype="float32"):
  rng = np.random.default_rng(0)
  inputs = rng.standard_normal((num_rows, num_positions * length))
  codebook = rng.standard_normal((num_codes, length))
  codes = rng.integers(0, num_codes, (num_positions, c_out))
  return (
    inputs.astype(ml_dtypes.bfloat16),
    codebook.astype(dtype),
    codes.astype(np.min_scalar_type(num_codes - 1)),
  )


def _expected(inputs, codebook, codes):
  """Returns the product in float64 with weights rounded to bfloat16."""
  weights = codebook.astype(ml_dtypes.bfloat16).astype(np.float64)[codes]
  kernel = weights.transpose(0, 2, 1).reshape(-1, codes.shape[1])
  return inputs.astype(np.float64) @ kernel


def _check(got, want, error):
  got = np.asarray(got, np.float64)
  assert abs(got - want).max() <= error * abs(want).max()


def _join(codes, joined):
  groups = codes.reshape(-1, joined, codes.shape[1]).transpose(0, 2, 1)
  return np.ascontiguousarray(groups)


@pytest.mark.parametrize(
  "arguments, book, result, tiling",
  [
    # rows, M, C_out, K, D; then outputs, warps, splits, copies, ahead, joined
    ((1, 32, 32, 16, 8), "float32", "float32", (4, 4, 1, 8, 2, 1)),
    ((3, 38, 52, 256, 8), "float32", "float32", (4, 4, 2, 2, 2, 1)),
    ((9, 37, 96, 300, 8), "float32", "float32", (8, 4, 1, 4, 1, 1)),
    ((16, 41, 80, 16, 4), "bfloat16", "float32", (16, 4, 1, 16, 3, 1)),
    ((2, 19, 36, 16, 16), "float32", "bfloat16", (4, 4, 1, 2, 1, 1)),
    ((9, 40, 36, 16, 8), "float32", "float32", (4, 4, 1, 8, 1, 4)),
    ((9, 40, 36, 16, 4), "float32", "float32", (4, 4, 1, 16, 1, 4)),
    ((2, 36, 40, 300, 4), "float32", "float32", (8, 4, 2, 1, 2, 2)),
  ],
)
def test_the_program_multiplies_as_float64_does(
  arguments, book, result, tiling
):
  inputs, codebook, codes = _case(*arguments, book)
  outputs, warps, splits, copies, ahead, joined = tiling
  plan = hopper_source.Plan(
    *arguments,
    code_bytes=codes.dtype.itemsize,
    joined=joined,
    book_bytes=codebook.dtype.itemsize,
    out_bytes=np.dtype(result).itemsize,
    outputs=outputs,
    warps=warps,
    splits=splits,
    copies=copies,
    ahead=ahead,
  )
  got = ptx.run(
    hopper_source.write(plan),
    [inputs, codebook, _join(codes, joined)],
    np.zeros((splits, plan.num_rows, plan.c_out), result),
    num_blocks=plan.num_tiles * splits,
    num_threads=32 * warps,
    shared_size=plan.shared_size,
  )
  error = 2e-6 if result == "float32" else 8e-3
  _check(
    got.astype(np.float64).sum(0), _expected(inputs, codebook, codes), error
  )


def _plan(num_rows, num_positions, c_out, num_codes, length, **changes):
  dtypes = {"inputs": "bfloat16", "codebook": "float32", "dtype": "float32"}
  dtypes |= changes
  return hopper.make_plan(
    jax.ShapeDtypeStruct((num_rows, num_positions * length), dtypes["inputs"]),
    jax.ShapeDtypeStruct((num_codes, length), dtypes["codebook"]),
    jax.ShapeDtypeStruct(
      (num_positions, c_out), np.min_scalar_type(num_codes - 1)
    ),
    dtypes["dtype"],
  )


def test_plans_fit_the_processor():
  for length in (4, 8, 16):
    for num_codes in (2, 256, 300, 4096):
      for c_out in (4, 768, 4096, 50_000):
        for num_rows in (1, 8, 16):
          plan = _plan(num_rows, 96, c_out, num_codes, length)
          if plan is None:
            assert (length, num_rows) == (4, 16) or num_codes == 4096
            continue
          assert plan.shared_size <= nvidia.SHARED_BYTES
          assert c_out % plan.outputs == 0
          assert 1 <= plan.ahead * length <= 32
          assert plan.num_tiles * plan.tile >= c_out


def test_the_plan_of_a_large_layer_is_the_one_that_was_measured():
  plan = _plan(1, 512, 4096, 256, 8)
  tiling = plan.outputs, plan.warps, plan.splits, plan.copies, plan.ahead
  assert tiling == (4, 16, 1, 8, 4)
  assert _plan(1, 1024, 4096, 256, 4).ahead == 4


@pytest.mark.parametrize(
  "arguments, changes",
  [
    ((17, 8, 8, 16, 8), {}),
    ((9, 8, 8, 16, 4), {}),
    ((1, 8, 8, 16, 9), {}),
    ((1, 8, 6, 16, 8), {}),
    ((1, 8, 8, 70_000, 8), {}),
    ((1, 8, 8, 16, 8), {"inputs": "float32"}),
    ((1, 8, 8, 16, 8), {"codebook": "float16"}),
    ((1, 8, 8, 16, 8), {"dtype": "float16"}),
  ],
)
def test_there_is_no_plan_for_what_the_kernel_cannot_do(arguments, changes):
  assert _plan(*arguments, **changes) is None


@needs_new_jax
@pytest.mark.parametrize("num_rows, length", [(1, 8), (16, 8), (8, 4)])
def test_it_is_compiled_for_hopper_alone(monkeypatch, num_rows, length):
  inputs, codebook, codes = _case(num_rows, 64, 64, 256, length)
  run = functools.partial(products.product, weight_dtype="bfloat16")
  text = {}
  for has_kernel in (False, True):
    monkeypatch.setattr(nvidia, "is_available", lambda has=has_kernel: has)
    traced = jax.jit(lambda *arrays: run(*arrays)).trace(
      inputs, codebook, codes
    )
    for platform in ("cpu", "cuda"):
      lowered = traced.lower(lowering_platforms=(platform,))
      text[has_kernel, platform] = lowered.as_text()
  has_kernel = {key: "mosaic_gpu" in value for key, value in text.items()}
  assert [key for key, value in has_kernel.items() if value] == [(True, "cuda")]


@needs_new_jax
@pytest.mark.parametrize(
  "num_rows, dtype, has_kernel",
  [(1, "bfloat16", True), (17, "bfloat16", False), (1, "float32", False)],
)
def test_auto_has_it_for_few_rows_and_decodes_nothing(
  monkeypatch, num_rows, dtype, has_kernel
):
  monkeypatch.setattr(apply, "LARGE", 0)
  monkeypatch.setattr(nvidia, "is_available", lambda: True)
  kernel = coded.make_kernel(0, (64, 64), num_codes=256, channels=8)
  network = inference.make_apply(
    lambda variables, x: x @ variables["w"][...].astype(x.dtype), {"w": kernel}
  )
  traced = network.apply_fn.trace(
    network.variables, jax.ShapeDtypeStruct((num_rows, 64), dtype)
  )
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert ("mosaic_gpu" in text) == has_kernel
  assert ("dot_general" in text) == (not has_kernel)
  assert "gather" not in text


@needs_new_jax
def test_examples_of_vmap_have_it_and_gradients_do_not(monkeypatch):
  monkeypatch.setattr(nvidia, "is_available", lambda: True)
  inputs, codebook, codes = _case(2, 8, 8, 16, 8)

  def run(inputs):
    return products.product(inputs, codebook, codes, weight_dtype="bfloat16")

  def lower(function, *arrays):
    traced = jax.jit(function).trace(*arrays)
    return traced.lower(lowering_platforms=("cuda",)).as_text()

  assert "mosaic_gpu" in lower(jax.vmap(run), inputs[None])
  assert "mosaic_gpu" not in lower(jax.grad(lambda x: run(x).sum()), inputs)


@pytest.fixture
def on_cpu():
  with jax.default_device(jax.local_devices(backend="cpu")[0]):
    yield


# Beside a GPU the CPU's program keeps its bits, and gradients go another way.
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("num_rows", [1, 20])
def test_other_platforms_do_as_before(monkeypatch, num_rows):
  inputs, codebook, codes = _case(num_rows, 6, 8, 16, 8)
  inputs, codebook = jnp.asarray(inputs), jnp.asarray(codebook)

  def run(inputs, codebook):
    product = products.product(
      inputs, codebook, codes, weight_dtype="bfloat16", dtype="float32"
    )
    return jnp.square(product).sum(), product

  def results():
    return jax.grad(run, (0, 1), has_aux=True)(inputs, codebook)

  monkeypatch.setattr(nvidia, "is_available", lambda: False)
  want = results()
  monkeypatch.setattr(nvidia, "is_available", lambda: True)
  if jax.__version_info__ >= nvidia.FIRST_JAX or num_rows > 16:
    jax.tree.map(np.testing.assert_array_equal, results(), want)
  cast = products.product(inputs, codebook.astype("bfloat16"), codes)
  np.testing.assert_array_equal(cast, want[1])


@needs_hopper
@pytest.mark.parametrize(
  "arguments",
  [
    *((1, 512, 4096, 256, 8), (16, 96, 3072, 256, 8), (8, 64, 1000, 256, 4)),
    *((4, 64, 4096, 1024, 16), (1, 64, 512, 4096, 8), (3, 5, 4, 2, 8)),
    # which it decodes
    *((1, 30, 64, 16, 9), (64, 64, 256, 256, 8)),
  ],
)
def test_a_gpu_multiplies_as_float64_does(arguments):
  inputs, codebook, codes = _case(*arguments)
  want = _expected(inputs, codebook, codes)
  run = jax.jit(functools.partial(products.product, weight_dtype=jnp.bfloat16))
  _check(run(inputs, codebook, codes), want, 1e-5)
  rows = jnp.asarray(inputs)[None].repeat(2, axis=0)
  both = jax.vmap(lambda rows: run(rows, codebook, codes))(rows)
  for got in both:
    _check(got, want, 1e-5)


@needs_hopper
def test_a_gpu_decodes_for_float32():
  inputs, codebook, codes = _case(4, 64, 256, 256, 8)
  inputs = inputs.astype(np.float32)
  got = products.product(inputs, codebook, codes, precision="highest")
  kernel = codebook.astype(np.float64)[codes].transpose(0, 2, 1)
  _check(got, inputs.astype(np.float64) @ kernel.reshape(-1, 256), 1e-6)

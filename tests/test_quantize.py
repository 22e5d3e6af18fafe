import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pqf_jax import errors, quantize
from pqf_jax.core import blocks, trees, vq_array
from pqf_jax.core import plan as plans

RULES = (plans.Rule(".*", 16, channels=2, kmeans_steps=20),)


@pytest.fixture(scope="module")
def variables():
  rng = np.random.default_rng(0)
  shapes = {"a": (3, 3, 8, 16), "b": (16, 32)}
  kernels = {
    name: {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)}
    for name, shape in shapes.items()
  }
  return {"params": kernels}


@pytest.fixture(scope="module")
def quantized(variables):
  return _run(variables)


def _run(variables, key=0):
  plan = plans.make_plan(RULES, variables)
  return quantize.quantize_params(jax.random.key(key), variables, plan)


def test_codes_are_the_nearest_codewords(variables, quantized):
  compressed, _ = quantized
  for path, node in trees.flatten(compressed, vq_array.is_vq).items():
    vectors = node.spec.to_blocks(trees.flatten(variables)[path])
    codebook = np.asarray(node.codebook, np.float64)
    gaps = np.asarray(vectors, np.float64)[:, :, None] - codebook
    nearest = (gaps**2).sum(-1).argmin(-1)
    np.testing.assert_array_equal(node.codes, nearest)


def test_reported_distortion_is_that_of_the_decoded_kernel(
  variables, quantized
):
  compressed, summaries = quantized
  dense = trees.flatten(vq_array.decode_params(compressed))
  for path, kernel in trees.flatten(variables).items():
    kernel = np.asarray(kernel, np.float64)
    error = np.mean((np.asarray(dense[path]) - kernel) ** 2) / np.var(kernel)
    assert summaries[path].distortion == pytest.approx(error, rel=1e-4)
    assert 0 < error < 1


def test_a_layer_does_not_depend_on_the_others(variables, quantized):
  both, _ = quantized
  alone, _ = _run({"params": {"b": variables["params"]["b"]}})
  jax.tree.map(
    np.testing.assert_array_equal, both["params"]["b"], alone["params"]["b"]
  )


@pytest.mark.parametrize("axis", [0, 1])
def test_layers_of_a_stack_are_quantized_like_single_ones(variables, axis):
  layers = np.random.default_rng(1).normal(size=(3, 16, 32)).astype(np.float32)
  stacked = {"w": jnp.asarray(np.moveaxis(layers, 0, axis))}
  inputs, outputs = (1 - min(axis, 1), 2)
  axes = blocks.KernelAxes((inputs,), (outputs,), (axis,))
  plan = plans.make_plan(RULES, stacked, {"w": axes})
  compressed, summaries = quantize.quantize_params(
    jax.random.key(0), stacked, plan
  )
  node = compressed["w"]
  assert node.shape == stacked["w"].shape
  for i, layer in enumerate(layers):
    one = jax.tree.map(lambda leaf, i=i: leaf.take(i, axis), node)
    vectors = np.asarray(one.spec.to_blocks(layer), np.float64)
    gaps = vectors[:, :, None] - np.asarray(one.codebook, np.float64)
    np.testing.assert_array_equal(one.codes, (gaps**2).sum(-1).argmin(-1))
  lost = np.mean((np.asarray(node) - stacked["w"]) ** 2)
  expected = float(lost) / np.mean(np.var(layers, (1, 2)))
  assert summaries["w"].distortion == pytest.approx(expected, rel=1e-4)
  assert len(np.unique(np.asarray(node.codebook))) == np.size(node.codebook)


def test_the_key_decides(variables, quantized):
  first, second = quantized[0], _run(variables, key=1)[0]
  kernels = [tree["params"]["a"]["kernel"].codes for tree in (first, second)]
  assert not np.array_equal(*kernels)


def test_a_constant_kernel_is_lossless():
  variables = {"a": {"kernel": jnp.full((16, 32), 0.5)}}
  compressed, summaries = _run(variables)
  assert summaries["a/kernel"].distortion == 0
  np.testing.assert_allclose(compressed["a"]["kernel"].decode(), 0.5)


def test_bad_weights_are_named_before_any_work(variables):
  kernel = np.array(variables["params"]["b"]["kernel"])
  kernel[3, 4] = np.nan
  bad = trees.replace(variables, {"params/b/kernel": kernel})
  progress = []
  plan = plans.make_plan(RULES, bad)
  with pytest.raises(errors.InputError, match="params/b/kernel has 1 NaN"):
    quantize.quantize_params(
      jax.random.key(0), bad, plan, on_layer=progress.append
    )
  assert not progress


@pytest.mark.parametrize("scale", [1e-300, 1e-20, 1e18])
def test_weights_beyond_float32_squares_are_refused(scale):
  variables = {"a": {"kernel": np.linspace(-1, 1, 512).reshape(16, 32) * scale}}
  with pytest.raises(errors.InputError, match="a/kernel has weights up to"):
    _run(variables)


@pytest.mark.parametrize("scale", [1e-14, 1e11])
def test_weights_of_any_scale_in_between_are_quantized_alike(scale):
  kernel = np.linspace(-1, 1, 512, dtype=np.float32).reshape(16, 32)
  errors_of = [
    _run({"a": {"kernel": kernel * np.float32(size)}})[1]["a/kernel"].distortion
    for size in (1, scale)
  ]
  assert errors_of[0] > 0
  assert errors_of[1] == pytest.approx(errors_of[0], rel=0.2)


def test_the_callers_kernels_survive():
  # Sub-vectors that are whole rows of the kernel, as they lie in memory.
  kernel = jnp.asarray(
    np.random.default_rng(0).normal(size=(64, 4)), jnp.float32
  )
  spec = blocks.BlockSpec(4, (1,), (0,))
  plan = {"a": plans.LayerPlan(spec, 16, 20)}
  quantized, _ = quantize.quantize_params(
    jax.random.key(0), {"a": kernel}, plan
  )
  assert quantized["a"].shape == kernel.shape
  assert jnp.isfinite(kernel).all()

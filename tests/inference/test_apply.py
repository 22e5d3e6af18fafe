"""Every form of a network gives what its dense kernels give."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pqf_jax import errors, inference, nvidia
from pqf_jax.core import blocks, vq_array
from pqf_jax.inference import apply
from tests.inference import coded

LAZY = ("layer", "fused")


def _outputs(apply_fn, variables, form, *inputs, **settings):
  network = inference.make_apply(apply_fn, variables, form, **settings)
  return network.apply_fn(network.variables, *inputs)


def _check(apply_fn, variables, *inputs, rtol=1e-5):
  """Compares the forms that keep codes with the dense network."""
  dense = vq_array.decode_params(variables)
  expected = np.asarray(apply_fn(dense, *inputs), np.complex128)
  scale = abs(expected).max()
  for form, crossover in (("layer", None), ("fused", 0), ("fused", 10**9)):
    got = _outputs(apply_fn, variables, form, *inputs, crossover=crossover)
    got = np.asarray(got, np.complex128)
    np.testing.assert_allclose(got, expected, rtol, rtol * scale)


def _scans(apply_fn, variables, form, *inputs, **settings):
  """Returns the loops over positions: the products made from codes."""
  network = inference.make_apply(apply_fn, variables, form, **settings)
  program = jax.make_jaxpr(network.apply_fn)(network.variables, *inputs)
  return str(program).count("scan[")


class Convolutions(nn.Module):
  dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(8, (3, 3), dtype=self.dtype, name="taps")(x))
    x = nn.Conv(12, (1, 1), strides=2, dtype=self.dtype, name="point")(x)
    x = nn.relu(x).mean((1, 2))
    return nn.Dense(10, dtype=self.dtype, name="head")(x)


def _convolutions(dtype=None):
  network = Convolutions(dtype)
  images = jax.random.normal(jax.random.key(0), (3, 6, 6, 4))
  variables = network.init(jax.random.key(1), images)
  layers = variables["params"]
  layers["taps"]["kernel"] = coded.make_kernel(
    0, (3, 3, 4, 8), num_codes=5, channels=2
  )
  layers["point"]["kernel"] = coded.make_kernel(
    1, (1, 1, 8, 12), num_codes=6, channels=4
  )
  layers["head"]["kernel"] = coded.make_kernel(
    2, (12, 10), num_codes=7, channels=4
  )
  return network, variables, images


def test_convolutions_and_matrices():
  network, variables, images = _convolutions()
  _check(network.apply, variables, images)
  for form, crossover, expected in (
    ("fused", 10**9, 2),
    ("fused", 0, 1),  # a convolution of many positions is decoded
    ("layer", 10**9, 0),
  ):
    assert expected == _scans(
      network.apply, variables, form, images, crossover=crossover
    )


def test_activations_of_bfloat16():
  network, variables, images = _convolutions(jnp.bfloat16)
  _check(network.apply, variables, images, rtol=2e-2)


def test_complex_numbers_and_large_integers_are_exact():
  """Products by codes are of floats: these would lose a part, or digits."""
  kernel = coded.make_kernel(0, (16, 12), num_codes=8, channels=4)
  rng = np.random.default_rng(1)

  def spectrum(variables, x):
    return jnp.fft.fft(x) @ variables["w"].astype(jnp.complex64)

  def count(variables, x):
    return x @ (variables["w"] * 1e4).astype(jnp.int32)

  def cast(variables, x):
    return x @ variables["w"].astype(jnp.int32)

  signal = jnp.asarray(rng.normal(size=(3, 16)), jnp.float32)
  _check(spectrum, {"w": kernel}, signal)
  numbers = jnp.asarray(rng.integers(2**12, 2**13, (3, 16)), jnp.int32)
  large = kernel.replace(codebook=kernel.codebook * 2**12 + 1)
  for apply_fn, node in ((count, kernel), (cast, large)):
    expected = apply_fn({"w": node.decode()}, numbers)
    for form in inference.FORMS:
      got = _outputs(apply_fn, {"w": node}, form, numbers)
      np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("crossover", [None, 0])
def test_no_rows_give_no_rows(crossover):
  network, variables, images = _convolutions()
  got = _outputs(
    network.apply, variables, "fused", images[:0], crossover=crossover
  )
  assert got.shape == (0, 10)


def test_it_composes_with_jit_vmap_and_grad():
  network, variables, images = _convolutions()
  trainable, frozen = vq_array.split_trainable(variables)

  def loss(apply_fn, trainable, frozen, images):
    variables = vq_array.merge_trainable(trainable, frozen)
    logits = jax.vmap(lambda x: apply_fn(variables, x[None])[0])(images)
    return (logits**2).sum()

  def gradients(apply_fn, variables):
    parts = vq_array.split_trainable(variables)
    get = jax.grad(loss, (1, 3))
    return jax.jit(get, static_argnums=0)(apply_fn, *parts, images)

  expected = jax.tree.leaves(gradients(network.apply, variables))
  for form in LAZY:
    made = inference.make_apply(network.apply, variables, form)
    got = jax.tree.leaves(gradients(made.apply_fn, made.variables))
    for left, right in zip(got, expected, strict=True):
      np.testing.assert_allclose(left, right, 1e-4, 1e-4)


def test_kernels_of_several_axes_and_of_other_orders():
  """Attention's projections, Equinox's [out, in], and `weight @ x`."""
  variables = {
    "query": coded.make_kernel(
      0, (8, 2, 6), num_codes=5, spec=blocks.BlockSpec(4, (-3,), (-2, -1))
    ),
    "out": coded.make_kernel(
      1, (2, 6, 8), num_codes=5, spec=blocks.BlockSpec(3, (-3, -2), (-1,))
    ),
    "equinox": coded.make_kernel(
      2, (5, 8), num_codes=6, spec=blocks.BlockSpec(2, (-1,), (-2,))
    ),
    "left": coded.make_kernel(
      3, (4, 5), num_codes=6, spec=blocks.BlockSpec(5, (-1,), (-2,))
    ),
  }

  def apply_fn(variables, x):
    heads = jnp.einsum("btf,fhd->bthd", x, variables["query"][...])
    x = jnp.einsum("bthd,hdf->btf", heads, variables["out"][...])
    x = x @ variables["equinox"][...].T
    return jnp.matmul(variables["left"][...], jnp.swapaxes(x, 1, 2))

  x = jax.random.normal(jax.random.key(0), (3, 4, 8))
  _check(apply_fn, variables, x)
  assert _scans(apply_fn, variables, "fused", x) == 4


def test_an_embedding_that_is_read_twice():
  table = coded.make_kernel(
    0, (9, 8), num_codes=5, spec=blocks.BlockSpec(4, (-1,), (-2,))
  )
  variables = {"params": {"embedding": table}}
  embed = nn.Embed(9, 8)

  def apply_fn(variables, tokens):
    hidden = embed.apply(variables, tokens)
    return embed.apply(variables, hidden, method="attend")

  tokens = jnp.array([[0, 8, 3], [9, -1, 2]])  # 9 is none of the rows
  dense = vq_array.decode_params(variables)
  expected = apply_fn(dense, tokens)
  assert jnp.isnan(expected).any()
  for form in LAZY:
    got = _outputs(apply_fn, variables, form, tokens)
    np.testing.assert_allclose(got, expected, 1e-5, 1e-5)
  assert _scans(apply_fn, variables, "fused", tokens) == 1


def _stack(axis, size, num_layers):
  """Returns a kernel whose layers are stacked along an axis."""
  return vq_array.stack_layers(
    *jax.tree.leaves(
      coded.make_kernel(
        0, (size, size), num_codes=16, channels=4, stack=(num_layers,)
      )
    ),
    (size, size),
    blocks.BlockSpec(4, stack_axes=(axis,)),
  )


def _loop(axis):
  """Returns a network that loops over the layers of a stack."""

  def apply_fn(variables, x):
    def layer(x, kernel):
      x = jnp.tanh(x @ kernel + x @ variables["shared"][...])
      return x, x.sum()

    kernels = jnp.moveaxis(variables["kernel"][...], axis, 0)
    x, sums = lax.scan(layer, x, kernels)
    return x + sums.sum()

  return apply_fn


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_stacked_kernels_of_a_scan(axis):
  shared = coded.make_kernel(1, (8, 8), num_codes=5, channels=4)
  variables = {"kernel": _stack(axis, 8, 3), "shared": shared}
  x = jax.random.normal(jax.random.key(0), (2, 8))
  _check(_loop(axis), variables, x)
  # The loop over layers, and inside of it those of the two products.
  assert _scans(_loop(axis), variables, "fused", x) == 3


@pytest.mark.parametrize("axis", [0, 1])
def test_memory_of_a_scan_is_that_of_its_body(axis):
  size = 256
  shared = coded.make_kernel(1, (size, size), num_codes=5, channels=4)
  variables = {"kernel": _stack(axis, size, 6), "shared": shared}
  network = inference.make_apply(_loop(axis), variables, "layer")
  held = _temporary_bytes(network, jnp.ones((16, size)))
  assert held < 2.5 * 4 * size**2  # two kernels


def _temporary_bytes(network, *inputs):
  compiled = network.apply_fn.lower(network.variables, *inputs).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def test_kernels_that_other_equations_read():
  kernel = coded.make_kernel(0, (6, 4), num_codes=5, channels=3)
  variables = {"kernel": kernel, "square": kernel, "flag": jnp.array(True)}

  def apply_fn(variables, x):
    kernel, square = variables["kernel"][...], variables["square"][...]
    x = x @ (kernel / jnp.linalg.norm(kernel, axis=0)[None])  # nn.WeightNorm
    x = x @ square.reshape(4, 6)
    x = lax.cond(variables["flag"], lambda: x @ kernel, lambda: x[:, :4])
    x = lax.fori_loop(0, 2, lambda _, y: y + (x @ kernel.T) @ kernel, x)
    return x + (kernel**2).sum() + kernel[:1]

  _check(apply_fn, variables, jax.random.normal(jax.random.key(0), (2, 6)))


def test_gradients_that_a_function_defines_are_kept():
  kernel = coded.make_kernel(0, (6, 4), num_codes=5, channels=3)

  @jax.custom_vjp
  def straight_through(kernel):
    return jnp.round(kernel)

  straight_through.defvjp(
    lambda kernel: (straight_through(kernel), None),
    lambda _, gradient: (gradient,),
  )

  def apply_fn(variables, x):
    return nn.relu(x @ straight_through(variables["w"][...]))

  def gradient(apply_fn, kernel):
    def loss(codebook):
      return apply_fn({"w": kernel.replace(codebook=codebook)}, x).sum()

    return jax.grad(loss)(kernel.codebook)

  x = jnp.ones((2, 6))
  expected = gradient(apply_fn, kernel)
  assert expected.any()
  for form in LAZY:
    made = inference.make_apply(apply_fn, {"w": kernel}, form)
    got = gradient(made.apply_fn, made.variables["w"])
    np.testing.assert_allclose(got, expected, 1e-5)


def test_rows_outside_of_an_embedding_are_filled_as_asked():
  table = coded.make_kernel(
    0, (9, 8), num_codes=5, spec=blocks.BlockSpec(4, (-1,), (-2,))
  )
  tokens = jnp.array([[0, 9, -10], [8, -1, 2]])
  for settings in (
    {"mode": "clip"},
    {"mode": "wrap"},
    {"mode": "fill", "fill_value": 2.5},
  ):

    def apply_fn(variables, tokens, settings=settings):
      return jnp.take(variables["e"][...], tokens, axis=0, **settings)

    _check(apply_fn, {"e": table}, tokens)


def test_an_embedding_is_not_decoded_for_its_rows():
  table = coded.make_kernel(
    0, (2000, 64), num_codes=5, spec=blocks.BlockSpec(4, (-1,), (-2,))
  )

  def apply_fn(variables, tokens):
    return jnp.take(variables["e"][...], tokens, axis=0)

  for form in LAZY:
    network = inference.make_apply(apply_fn, {"e": table}, form)
    assert _temporary_bytes(network, jnp.arange(8)) < table.size


def test_functions_need_not_be_hashable():
  kernel = coded.make_kernel(0, (6, 4), num_codes=5, channels=3)

  class Layer:
    __hash__ = None

    def __call__(self, variables, x):
      return x @ variables["w"][...]

  x = jnp.ones((2, 6))
  for form in inference.FORMS:
    got = _outputs(Layer(), {"w": kernel}, form, x)
    np.testing.assert_allclose(got, x @ kernel.decode(), 1e-5, 1e-5)


def test_a_kernel_may_be_an_output_and_outputs_a_tree():
  kernel = coded.make_kernel(0, (6, 4), num_codes=5, channels=3)

  def apply_fn(variables, x):
    return {"product": x @ variables["w"][...], "w": variables["w"][...]}

  x = jnp.ones((2, 6))
  for form in inference.FORMS:
    got = _outputs(apply_fn, {"w": kernel}, form, x)
    np.testing.assert_array_equal(got["w"], kernel.decode())
    np.testing.assert_allclose(got["product"], x @ kernel.decode(), 1e-5, 1e-5)


@pytest.mark.parametrize("num_rows", [1, 32])
def test_memory_is_that_of_one_kernel(num_rows):
  size, depth = 512, 6
  variables = {
    str(i): coded.make_kernel(i, (size, size), num_codes=16, channels=8)
    for i in range(depth)
  }

  def apply_fn(variables, x):
    for i in range(depth):
      x = nn.relu(x @ variables[str(i)][...])
    return x

  x = jnp.ones((num_rows, size))
  kernel_bytes = 4 * size**2
  for form in ("layer", "fused"):
    network = inference.make_apply(apply_fn, variables, form)
    held = _temporary_bytes(network, x)
    assert held < 1.5 * kernel_bytes, form


def test_activations_take_no_more_memory_than_with_dense_kernels():
  """What an activation was computed of is not held until the next kernel."""
  size, depth, num_rows = 64, 6, 2048
  variables = {
    str(i): coded.make_kernel(i, (size, size), num_codes=16, channels=8)
    for i in range(depth)
  }

  def apply_fn(variables, x):
    for i in range(depth):
      x = nn.gelu(x @ variables[str(i)][...])
    return x

  x = jnp.ones((num_rows, size))
  held = {
    form: _temporary_bytes(inference.make_apply(apply_fn, variables, form), x)
    for form in ("dense", "layer", "fused")
  }
  kernel_bytes, activation_bytes = 4 * size**2, 4 * num_rows * size
  assert held["layer"] <= held["dense"] + 1.2 * kernel_bytes
  assert held["fused"] <= held["dense"] + 1.05 * activation_bytes


def test_auto_fuses_large_matrices_only(monkeypatch):
  monkeypatch.setattr(apply, "LARGE", 200)
  shapes = {"large": (20, 12), "small": (12, 12), "taps": (1, 1, 12, 20)}
  variables = {
    name: coded.make_kernel(0, shape, num_codes=5, channels=4)
    for name, shape in shapes.items()
  }
  network = inference.make_apply(lambda v, x: x, variables)
  held = {name: type(leaf).__name__ for name, leaf in network.variables.items()}
  assert held["large"] == "Kernel"
  assert held["small"] == held["taps"] == "ArrayImpl"


def test_auto_is_dense_where_products_of_codes_are_slow(monkeypatch):
  monkeypatch.setattr(apply, "LARGE", 0)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  kernel = coded.make_kernel(0, (12, 8), num_codes=5, channels=4)
  network = inference.make_apply(lambda v, x: x, {"w": kernel})
  np.testing.assert_array_equal(network.variables["w"], kernel.decode())


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_kernels_in_both_forms_are_read_as_dense_ones(monkeypatch, axis):
  monkeypatch.setattr(apply, "LARGE", 0)
  monkeypatch.setattr(nvidia, "is_available", lambda: True)
  variables = {
    "kernel": _stack(axis, 8, 3),
    "shared": coded.make_kernel(1, (8, 8), num_codes=5, channels=4),
    "table": coded.make_kernel(
      2, (9, 8), num_codes=5, spec=blocks.BlockSpec(4, (-1,), (-2,))
    ),
  }

  def apply_fn(variables, tokens):
    table = variables["table"][...]
    x = _loop(axis)(variables, jnp.take(table, tokens, axis=0))
    return x.astype(jnp.float16) @ table.astype(jnp.float16).T

  network = inference.make_apply(apply_fn, variables)
  assert all(leaf.dense is not None for leaf in network.variables.values())
  tokens = jnp.array([0, 8, 3])
  got = network.apply_fn(network.variables, tokens)
  dense = inference.make_apply(apply_fn, variables, "dense")
  want = dense.apply_fn(dense.variables, tokens)
  np.testing.assert_array_equal(got, want)


def test_bad_input_is_refused():
  kernel = coded.make_kernel(0, (6, 4), num_codes=5, channels=3)
  for settings, message in (
    ({"form": "fast"}, "form is 'fast'; expected one of auto, dense"),
    ({"crossover": -1}, "crossover is -1"),
  ):
    with pytest.raises(errors.InputError, match=message):
      inference.make_apply(lambda v, x: x, {"w": kernel}, **settings)
  shapes = {"w": jax.eval_shape(lambda: kernel)}
  with pytest.raises(errors.InputError, match="w/codebook.*with values"):
    inference.make_apply(lambda v, x: x, shapes)
  with pytest.raises(errors.InputError, match="cannot be traced"):
    _outputs(lambda v, x: float(x), {"w": kernel}, "fused", jnp.ones(()))

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pqf_jax import errors
from pqf_jax.core import blocks, vq_array


def _vq(shape=(3, 3, 4, 6), channels=2, num_codes=8, stacked=()):
  spec = blocks.BlockSpec(channels)
  c_out, m, block = spec.layout(shape)
  keys = jax.random.split(jax.random.key(0))
  codebook = jax.random.normal(keys[0], (*stacked, num_codes, block))
  codes = jax.random.randint(keys[1], (*stacked, c_out, m), 0, num_codes)
  return vq_array.VQArray(codebook, codes.astype(jnp.uint8), shape, spec)


def test_decode_places_the_codeword_of_every_sub_vector():
  node = _vq()
  kernel = np.asarray(node.decode())
  for o in range(6):
    for block in range(2):
      codeword = node.codebook[node.codes[o, block]]
      part = kernel[:, :, 2 * block : 2 * block + 2, o]
      np.testing.assert_array_equal(
        np.moveaxis(part, -1, 0).reshape(-1), codeword
      )


def test_codebook_gradient_sums_the_gradients_of_its_sub_vectors():
  node = _vq()
  weights = jax.random.normal(jax.random.key(1), node.shape)

  def loss(codebook):
    return (node.replace(codebook=codebook).decode() * weights).sum()

  dense = np.asarray(node.spec.to_blocks(weights)).reshape(-1, 18)
  expected = np.zeros((8, 18))
  np.add.at(expected, np.asarray(node.codes).reshape(-1), dense)
  got = jax.jit(jax.grad(loss))(node.codebook)
  np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize(
  ("shape", "stacked"),
  [((3, 3, 4, 6), (3,)), ((8, 5), ()), ((1, 1, 6, 130), ())],
)
def test_the_programs_of_tpus_give_the_same_bits(shape, stacked, monkeypatch):
  node = _vq(shape, stacked=stacked)
  weights = jax.random.normal(jax.random.key(1), node.shape)

  def run(codebook, weights):
    decoded, pullback = jax.vjp(
      lambda codebook: node.replace(codebook=codebook).decode(), codebook
    )
    return decoded, pullback(weights)

  expected = jax.jit(run)(node.codebook, weights)
  for_tpus = set()

  def choose(*arguments, tpu, default):
    del default
    for_tpus.add(tpu.__qualname__)
    return tpu(*arguments)

  monkeypatch.setattr(vq_array.lax, "platform_dependent", choose)
  got = jax.jit(lambda *arguments: run(*arguments))(node.codebook, weights)
  assert len(for_tpus) == 2  # decoding and its gradient
  jax.tree.map(np.testing.assert_array_equal, expected, got)


def test_linen_layers_read_it_as_a_kernel():
  layer = nn.Conv(6, (3, 3))
  images = jnp.ones((2, 5, 5, 4))
  node = _vq()
  dense = {"params": {"kernel": node.decode(), "bias": jnp.ones(6)}}
  compressed = {"params": {"kernel": node, "bias": jnp.ones(6)}}
  np.testing.assert_array_equal(
    jax.jit(layer.apply)(compressed, images), layer.apply(dense, images)
  )


def test_nnx_layers_read_it_as_a_kernel():
  zeros = nnx.initializers.zeros
  layer = nnx.Conv(4, 6, (3, 3), kernel_init=zeros, rngs=nnx.Rngs(0))
  images = jnp.ones((2, 5, 5, 4))
  node = _vq()
  layer.kernel = nnx.Param(node.decode())
  expected = layer(images)
  layer.kernel = nnx.Param(node)
  np.testing.assert_array_equal(layer(images), expected)


def test_scanned_linen_layers_slice_it():
  class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      return nn.Dense(4, use_bias=False, name="dense")(x), None

  stack = nn.scan(
    Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
  )()
  node = _vq((4, 4), channels=2, num_codes=4, stacked=(3,))
  assert node.shape == (3, 4, 4)
  x = jnp.ones((2, 4))

  def run(kernel):
    return stack.apply({"params": {"dense": {"kernel": kernel}}}, x, None)[0]

  np.testing.assert_allclose(run(node), run(node.decode()), rtol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_of_a_stack_are_layers(axis):
  rng = np.random.default_rng(0)
  spec = blocks.BlockSpec(2, stack_axes=(axis,))
  node = vq_array.stack_layers(
    rng.normal(size=(3, 8, 2)), rng.integers(0, 8, (3, 6, 2)), (4, 6), spec
  )
  dense = np.asarray(node)
  assert node.shape == dense.shape == tuple(np.insert((4, 6), axis, 3))
  for i, part in enumerate(np.moveaxis(dense, axis, 0)):
    layer = jax.tree.map(lambda leaf, i=i: leaf.take(i, axis), node)
    assert layer.shape == (4, 6)
    np.testing.assert_array_equal(layer, part)
    if axis == 0:
      for place in (i, np.int8(i - 3), jnp.int32(i)):
        np.testing.assert_array_equal(node[place], part)
        np.testing.assert_array_equal(
          jax.jit(lambda k, i: k[i])(node, place), part
        )
  mapped = jax.vmap(lambda kernel: kernel @ jnp.ones((6, 1)), axis)(node)
  np.testing.assert_allclose(
    mapped, np.moveaxis(dense, axis, 0) @ np.ones((6, 1)), atol=1e-5
  )
  with pytest.raises(errors.InputError, match="other than the stack axes"):
    jax.tree.map(lambda leaf: leaf[0, 0], node).decode()


def test_split_and_merge_are_inverse_and_part_by_kind():
  variables = {
    "params": {"conv": {"kernel": _vq()}, "bias": jnp.ones(3)},
    "batch_stats": {"mean": jnp.zeros(3)},
  }
  trainable, frozen = vq_array.split_trainable(variables)
  assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {
    jnp.dtype("float32")
  }
  assert len(jax.tree.leaves(trainable)) == 2
  assert len(jax.tree.leaves(frozen)) == 2
  merged = vq_array.merge_trainable(trainable, frozen)
  assert jax.tree.structure(merged) == jax.tree.structure(variables)
  jax.tree.map(np.testing.assert_array_equal, merged, variables)


@pytest.mark.parametrize(
  ("num_codes", "dtype"), [(2, "uint8"), (256, "uint8"), (257, "uint16")]
)
def test_codes_take_the_smallest_type(num_codes, dtype):
  assert vq_array.code_dtype(num_codes) == dtype


@pytest.mark.parametrize(
  "use",
  [
    np.asarray,
    np.sum,
    len,
    list,
    lambda k: k.T,
    lambda k: k.astype(jnp.float16),
    lambda k: k.reshape(-1),
    lambda k: k + 1,
    lambda k: 2 - k,
    lambda k: -k * k,
    lambda k: k > 0,
    lambda k: k == 1,
    lambda k: k @ jnp.ones((6, 2)),
    lambda k: np.ones((2, 4), np.float32) @ k,
    lambda k: 1 in k[0, 0, 0],
  ],
)
def test_it_behaves_like_the_array(use):
  node = _vq()
  got, expected = use(node), use(node.decode())
  assert type(got) is type(expected)
  jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_an_archive_of_numpy_holds_its_numbers(tmp_path):
  np.savez(tmp_path / "w.npz", kernel=_vq())
  with np.load(tmp_path / "w.npz") as archive:  # refuses pickles
    np.testing.assert_array_equal(archive["kernel"], _vq().decode())


def test_what_takes_arrays_only_says_how_to_make_one():
  with pytest.raises(ValueError, match="explicitly convert your object"):
    jax.lax.neg(_vq())
  jax.lax.neg(_vq()[...])
  with pytest.raises(ValueError, match="truth value"):
    bool(_vq())
  with pytest.raises(AttributeError, match=r"'weight'; kernel\["):
    getattr(_vq(), "wei" + "ght")

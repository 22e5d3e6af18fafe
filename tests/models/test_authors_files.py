"""The authors' layout, on made-up files and on released ones if present."""

import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pqf_jax import data, errors, pack
from pqf_jax.core import blocks, trees, vq_array
from pqf_jax.models import authors_files, resnet
from pqf_jax.pipeline.weights import torch_files
from tests.oracles import resnet_weights

IMAGES = np.random.default_rng(3).normal(size=(2, 6, 5, 3)).astype(np.float32)
# Name, depth, payload in bytes.
RELEASED = [
  ("resnet18", 18, 1_615_904),
  ("resnet18_large", 18, 1_079_328),
  ("resnet50_large", 50, 3_339_872),
]


class Net(nn.Module):
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(8, (3, 2), use_bias=False, name="conv1")(x)
    x = self.norm("bn1")(x)
    x = nn.Conv(12, (1, 1), use_bias=False, name="conv2")(nn.relu(x))
    return nn.Dense(5, name="fc")(self.norm("bn2")(x).mean((1, 2)))

  def norm(self, name):
    return nn.BatchNorm(
      use_running_average=True, epsilon=self.epsilon, name=name
    )


TEMPLATE = jax.eval_shape(Net().init, jax.random.key(0), IMAGES)


def compressed(module, c_out, m, block, num_codes, rng):
  """Draws a compressed kernel as the authors store it."""
  dtype = np.uint8 if num_codes <= 256 else np.int16
  codes = rng.integers(0, num_codes, (c_out, m)).astype(dtype)
  codebook = rng.normal(size=(num_codes, block)).astype(np.float16)
  return {f"{module}.codes_matrix": codes, f"{module}.codebook": codebook}


def made_up(channels=2, num_codes=7, seed=0):
  """Draws a file for `Net`: conv1 dense, conv2 and fc compressed."""
  rng = np.random.default_rng(seed)
  state_dict = {
    "conv1.weight": rng.normal(size=(8, 3, 3, 2)),
    "fc.bias": rng.normal(size=5),
  }
  for name, size in (("bn1", 8), ("bn2", 12)):
    state_dict[f"{name}.weight"] = rng.normal(size=size)
    state_dict[f"{name}.bias"] = rng.normal(size=size)
  state_dict = {k: v.astype(np.float32) for k, v in state_dict.items()}
  return (
    state_dict
    | compressed("conv2", 12, 8 // channels, channels, num_codes, rng)
    | compressed("fc", 5, 3, 4, 300, rng)
  )


def shape_of(**leaves):
  return trees.nest(
    {
      f"params/{module}/kernel": jax.ShapeDtypeStruct(shape, jnp.float32)
      for module, shape in leaves.items()
    }
  )


def assert_bitwise_equal(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("channels", [1, 2])
def test_every_weight_is_its_codewords_entry(channels):
  rng = np.random.default_rng(0)
  state_dict = compressed("conv", 5, 4 // channels, channels * 6, 9, rng)
  codes, codebook = state_dict.values()
  variables = authors_files.from_authors_layout(
    state_dict, shape_of(conv=(3, 2, 4, 5))
  )
  kernel = vq_array.decode_params(variables)["params"]["conv"]["kernel"]
  for (h, w, i, o), value in np.ndenumerate(kernel):
    entry = i % channels * 6 + h * 2 + w
    assert value == codebook[codes[o, i // channels], entry]


def test_rows_of_a_linear_layer_are_cut_the_same():
  state_dict = compressed("fc", 6, 2, 4, 300, np.random.default_rng(0))
  codes, codebook = state_dict.values()
  variables = authors_files.from_authors_layout(state_dict, shape_of(fc=(8, 6)))
  node = variables["params"]["fc"]["kernel"]
  np.testing.assert_array_equal(
    node.decode(), codebook[codes].reshape(6, 8).T.astype(np.float32)
  )
  assert node.codes.dtype == np.uint16
  assert node.codebook.dtype == np.float32


@pytest.mark.parametrize("epsilon", [1e-5, 1e-3])
def test_norms_multiply_by_their_weight_over_the_root(epsilon):
  state_dict = made_up()
  variables = authors_files.from_authors_layout(
    state_dict, TEMPLATE, norm_epsilon=epsilon
  )
  kernel = state_dict["conv1.weight"].transpose(2, 3, 1, 0)
  kernels = {"params": {"conv1": {"kernel": kernel}}}
  _, state = Net(epsilon).apply(
    variables, IMAGES, capture_intermediates=True, mutable=["intermediates"]
  )
  conv = nn.Conv(8, (3, 2), use_bias=False, name="conv1")
  maps = conv.apply({"params": kernels["params"]["conv1"]}, IMAGES)
  got = state["intermediates"]["bn1"]["__call__"][0]
  weight, bias = state_dict["bn1.weight"], state_dict["bn1.bias"]
  expected = np.float64(maps) * (weight / np.sqrt(1 + 1e-5)) + bias
  np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("epsilon", [1e-5, 1e-3, 0.3])
def test_packing_and_loading_changes_no_bit(epsilon, tmp_path):
  variables = authors_files.from_authors_layout(
    made_up(), TEMPLATE, norm_epsilon=epsilon
  )
  pack.save(tmp_path / "m.safetensors", variables, norm_epsilon=epsilon)
  assert_bitwise_equal(pack.load(tmp_path / "m.safetensors"), variables)


@settings(max_examples=25, deadline=None)
@given(
  st.sampled_from([1, 2, 4, 8]),
  st.sampled_from([1, 7, 256, 257, 40000]),
  st.integers(0, 9),
)
def test_our_networks_survive_their_layout(channels, num_codes, seed):
  rng = np.random.default_rng(seed)
  kernel_shape, spec = (3, 2, 8, 6), blocks.BlockSpec(channels)
  c_out, m, block = spec.layout(kernel_shape)
  codebook = rng.normal(size=(num_codes, block)).astype(np.float16)
  codes = rng.integers(0, num_codes, (c_out, m))
  node = vq_array.VQArray(
    jnp.asarray(codebook, jnp.float32),
    jnp.asarray(codes, vq_array.code_dtype(num_codes)),
    kernel_shape,
    spec,
  )
  variables = {"params": {"conv": {"kernel": node, "bias": jnp.ones(6)}}}
  state_dict = authors_files.to_authors_layout(variables)
  stored = state_dict["conv.codes_matrix"].dtype
  # The smallest type that they use; all but uint8 are signed.
  assert stored == {1: np.uint8, 7: np.uint8, 256: np.uint8}.get(
    num_codes, np.int16 if num_codes == 257 else np.int32
  )
  template = {
    "params": {
      "conv": {
        "kernel": jax.ShapeDtypeStruct(kernel_shape, jnp.float32),
        "bias": jax.ShapeDtypeStruct((6,), jnp.float32),
      }
    }
  }
  assert_bitwise_equal(
    authors_files.from_authors_layout(state_dict, template), variables
  )


@pytest.mark.parametrize("epsilon", [1e-5, 1e-3])
def test_norms_with_statistics_are_folded_into_two_vectors(epsilon):
  variables = authors_files.from_authors_layout(made_up(), TEMPLATE)
  rng = np.random.default_rng(1)
  variables["batch_stats"] = jax.tree.map(
    lambda leaf: jnp.asarray(rng.uniform(0.5, 2, leaf.shape), leaf.dtype),
    variables["batch_stats"],
  )
  state_dict = authors_files.to_authors_layout(variables, norm_epsilon=epsilon)
  assert state_dict.keys() == made_up().keys()
  back = authors_files.from_authors_layout(
    state_dict, TEMPLATE, norm_epsilon=epsilon
  )
  net = Net(epsilon)
  np.testing.assert_allclose(
    net.apply(back, IMAGES), net.apply(variables, IMAGES), rtol=2e-5, atol=2e-5
  )


def test_their_files_survive_our_variables():
  state_dict = made_up()
  variables = authors_files.from_authors_layout(state_dict, TEMPLATE)
  back = authors_files.to_authors_layout(variables)
  assert back.keys() == state_dict.keys()
  for name, array in state_dict.items():
    assert back[name].dtype == array.dtype
    np.testing.assert_array_max_ulp(
      np.float32(back[name]), np.float32(array), maxulp=1
    )


def test_only_files_with_codes_are_of_this_layout():
  assert authors_files.is_authors_layout(made_up())
  assert not authors_files.is_authors_layout(
    {"conv1.weight": 0, "bn1.running_mean": 0}
  )


def test_all_that_does_not_fit_is_in_one_message():
  state_dict = made_up()
  del state_dict["bn2.bias"], state_dict["fc.codebook"]
  state_dict["bn1.running_mean"] = np.zeros(8)
  state_dict["conv1.weight"] = np.full((8, 3, 3, 2), np.nan)
  state_dict["conv2.codes_matrix"] = np.zeros((12, 3), np.uint8)
  with pytest.raises(errors.InputError) as caught:
    authors_files.from_authors_layout(state_dict, TEMPLATE)
  message = str(caught.value)
  assert "2 missing (bn2.bias, fc.codebook)" in message
  assert "1 extra (bn1.running_mean)" in message
  assert "codes_matrix is (12, 3), the model has (12, 4)" in message
  assert "NaN or infinite (conv1.weight)" in message


@pytest.mark.parametrize(
  ("name", "value", "message"),
  [
    ("conv2.codes_matrix", np.full((12, 4), 7), "from 7 to 7.*0 to 6"),
    ("conv2.codes_matrix", np.full((12, 4), -1), "from -1 to -1"),
    ("conv2.codes_matrix", np.zeros((12, 4)), "of type float64"),
    ("conv2.codebook", np.zeros(7), r"conv2.codebook is \(7,\)"),
    ("conv2.codebook", np.zeros((0, 2)), "but the 0 codewords"),
    ("conv2.codebook", np.zeros((7, 0)), r"the model has \(12, 8\)"),
  ],
)
def test_codes_and_codebooks_that_disagree_are_refused(name, value, message):
  with pytest.raises(errors.InputError, match=message):
    authors_files.from_authors_layout(made_up() | {name: value}, TEMPLATE)


@pytest.mark.parametrize(
  ("shape", "block", "m", "message"),
  [
    ((3, 3, 4, 5), 12, 3, "12 weights, which is not a multiple of the 9 taps"),
    ((5, 6), 2, 2, "5 input channels, which cannot be .* of 2"),
    ((2, 6), 5, 0, "2 input channels, which cannot be .* of 5"),
  ],
)
def test_codebooks_that_cannot_cut_the_kernel_are_refused(
  shape, block, m, message
):
  rng = np.random.default_rng(0)
  state_dict = compressed("fc", shape[-1], m, block, 4, rng)
  with pytest.raises(errors.InputError, match=message):
    authors_files.from_authors_layout(state_dict, shape_of(fc=shape))


def test_what_their_layout_cannot_hold_is_refused():
  node = vq_array.VQArray(
    jnp.full((2, 4), 1e5),
    jnp.zeros((5, 2), jnp.uint8),
    (8, 5),
    blocks.BlockSpec(4),
  )
  with pytest.raises(errors.InputError, match="float16.*100000"):
    authors_files.to_authors_layout({"params": {"fc": {"kernel": node}}})
  stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), node)
  with pytest.raises(errors.InputError, match="fc/kernel is stacked"):
    authors_files.to_authors_layout({"params": {"fc": {"kernel": stacked}}})
  other = node.replace(spec=blocks.BlockSpec(4, (-1,), (-2,)))
  with pytest.raises(errors.InputError, match="cut along other axes"):
    authors_files.to_authors_layout({"params": {"fc": {"kernel": other}}})


def in_torch(state_dict):
  """Decodes a file of this layout with torch to a dense state dict."""
  import torch

  state = {
    name: torch.as_tensor(np.asarray(a)) for name, a in state_dict.items()
  }
  dense = {}
  for name, tensor in state.items():
    module, _, kind = name.rpartition(".")
    if kind == "codes_matrix":
      codebook = state[f"{module}.codebook"].float()
      dense[f"{module}.weight"] = codebook[tensor.long()].flatten(1)
    elif kind != "codebook":
      dense[name] = tensor
    if kind == "weight" and tensor.ndim == 1:
      dense[f"{module}.running_mean"] = torch.zeros_like(tensor)
      dense[f"{module}.running_var"] = torch.ones_like(tensor)
  return dense


def torch_logits(depth, num_classes, stem, state_dict, images):
  from tests.oracles import torch_resnet

  dense = in_torch(state_dict)
  shapes = resnet_weights.shapes(depth, num_classes, stem)
  weights = {
    name: dense[name].reshape(shape).numpy() for name, shape in shapes.items()
  }
  dtype = torch_resnet.torch.float32
  return torch_resnet.forward(weights, images, dtype=dtype).logits


def template_of(model):
  images = jnp.zeros((1, 32, 32, 3))
  return jax.eval_shape(model.init, jax.random.key(0), images)


def test_a_made_up_resnet_gives_torchs_logits():
  pytest.importorskip("torch")
  drawn = resnet_weights.draw(resnet_weights.shapes(18, 10, "small"))
  rng = np.random.default_rng(0)
  state_dict = {}
  for name, array in drawn.items():
    module, _, kind = name.rpartition(".")
    if array.ndim > 1 and name != "conv1.weight":
      taps = array[0, 0].size
      channels = 4 if taps == 1 else 2
      c_out, c_in = array.shape[:2]
      entry = compressed(
        module, c_out, c_in // channels, channels * taps, 64, rng
      )
      scale = np.sqrt(2 / c_in / taps).astype(np.float16)
      entry[f"{module}.codebook"] *= scale
      state_dict |= entry
    elif not kind.startswith("running"):
      state_dict[name] = array.astype(np.float32)
  model = resnet.make(depth=18, num_classes=10, stem="small")
  variables = authors_files.from_authors_layout(state_dict, template_of(model))
  images = resnet_weights.images(2, 16, 13, 3)
  np.testing.assert_allclose(
    jax.jit(model.apply)(variables, jnp.asarray(images, jnp.float32)),
    torch_logits(18, 10, "small", state_dict, images),
    atol=1e-3,
  )


@pytest.mark.parametrize(("name", "depth", "payload_bytes"), RELEASED)
def test_released_files_give_torchs_logits_before_and_after_packing(
  shared_data, tmp_path, name, depth, payload_bytes
):
  pytest.importorskip("torch")
  path = shared_data / "pqf_official" / f"{name}.pth"
  state_dict = torch_files.read(str(path))
  model = resnet.make(depth=depth, num_classes=1000)
  variables = authors_files.from_authors_layout(state_dict, template_of(model))
  dataset = data.get_dataset("imagenet2012", data_dir=str(shared_data / "tfds"))
  batch = next(data.eval_batches(dataset, batch_size=32))
  images = np.asarray(data.normalize(batch["image"], dataset.mean, dataset.std))
  apply = jax.jit(model.apply)
  logits = apply(variables, jnp.asarray(images, jnp.float32))
  np.testing.assert_allclose(
    logits,
    torch_logits(depth, 1000, "imagenet", state_dict, images),
    atol=1e-3,
  )
  packed = pack.save(
    tmp_path / "m.safetensors", variables, norm_epsilon=model.norm_epsilon
  )
  assert packed.payload_bytes == payload_bytes
  assert os.path.getsize(tmp_path / "m.safetensors") < os.path.getsize(path)
  loaded = pack.load(tmp_path / "m.safetensors")
  np.testing.assert_array_equal(
    apply(loaded, jnp.asarray(images, jnp.float32)), logits
  )
  again = authors_files.to_authors_layout(loaded)
  assert again.keys() == state_dict.keys()
  for entry, array in state_dict.items():
    assert again[entry].dtype == array.dtype
    np.testing.assert_array_max_ulp(
      np.float32(again[entry]), np.float32(array), maxulp=1
    )


@pytest.mark.parametrize(
  ("name", "depth", "message"),
  [("resnet50_large", 18, "132 extra"), ("resnet18", 50, "99 missing")],
)
def test_a_released_file_of_another_depth_is_refused(
  shared_data, name, depth, message
):
  pytest.importorskip("torch")
  path = shared_data / "pqf_official" / f"{name}.pth"
  model = resnet.make(depth=depth, num_classes=1000)
  with pytest.raises(errors.InputError, match=f"{message}.*another shape"):
    authors_files.from_authors_layout(
      torch_files.read(str(path)), template_of(model)
    )

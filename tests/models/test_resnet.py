import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from pqf_jax import errors
from pqf_jax.core import blocks, trees, vq_array
from pqf_jax.models import layers, resnet, torch_names
from tests.models import quick
from tests.oracles import resnet_weights

GOLDEN = np.load(
  pathlib.Path(__file__).parents[1] / "goldens" / "resnet_logits.npz"
)
CASES = resnet_weights.CASES


@functools.cache
def shapes(dtype=jnp.float32, **settings):
  """Returns the variables as shapes, all of one type (Flax makes float32)."""
  model = resnet.make(**settings)
  variables = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))
  )
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), variables
  )


@functools.lru_cache(maxsize=1)
def weights(case):
  depth, stem, _ = CASES[case]
  return resnet_weights.draw(resnet_weights.shapes(depth, 10, stem))


@functools.cache
def forward(case, dtype, train=False):
  """Returns (logits, updates) of our network for the oracle's case."""
  depth, stem, size = CASES[case]
  settings = {"depth": depth, "num_classes": 10, "stem": stem}
  template = shapes(np.promote_types(dtype, np.float32), **settings)
  # Flax's norms mix float32 with other types, which 'strict' forbids.
  promotion = "strict" if dtype == jnp.float32 else "standard"
  with jax.enable_x64(True), jax.numpy_dtype_promotion(promotion):
    model = resnet.make(**settings, dtype=dtype)
    apply = functools.partial(model.apply, train=train, mutable=["batch_stats"])
    variables = resnet.load_torch(weights(case), template)
    images = jnp.asarray(resnet_weights.images(2, *size, 3), dtype)
    return jax.tree.map(np.asarray, quick.jit(apply)(variables, images))


def assert_close(actual, expected, tolerance):
  """Asserts equality up to `tolerance` of the largest entry."""
  np.testing.assert_allclose(
    actual, expected, rtol=0, atol=tolerance * np.abs(expected).max()
  )


@pytest.mark.parametrize(
  ("depth", "num_parameters"), [(18, 11_689_512), (50, 25_557_032)]
)
def test_names_and_shapes_are_torchvisions(depth, num_parameters):
  template = shapes(depth=depth, num_classes=1000)
  variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape), template)
  ours = torch_names.flax_to_torch(variables)
  expected = resnet_weights.shapes(depth, 1000, "imagenet")
  assert {name: array.shape for name, array in ours.items()} == expected
  sizes = [leaf.size for leaf in jax.tree.leaves(template["params"])]
  assert sum(sizes) == num_parameters


def test_paths_are_torchvisions_names_with_slashes():
  paths = trees.flatten(shapes(depth=18, num_classes=10))
  assert {
    "params/conv1/kernel",
    "params/bn1/scale",
    "params/layer1/0/conv1/kernel",
    "params/layer2/0/downsample/0/kernel",
    "params/layer2/0/downsample/1/scale",
    "params/fc/kernel",
    "batch_stats/bn1/mean",
  } <= paths.keys()


@pytest.mark.parametrize("depth", [34, 101, 152])
def test_other_depths_have_torchvisions_number_of_parameters(depth):
  params = shapes(depth=depth, num_classes=1000)["params"]
  sizes = {34: 21_797_672, 101: 44_549_160, 152: 60_192_808}
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sizes[depth]


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_that_torch_gave(case):
  logits, _ = forward(case, jnp.float64)
  assert logits.dtype == np.float64
  assert_close(logits, GOLDEN[case], 1e-10)


def test_training_statistics_are_torchs_but_for_the_unbiased_variance():
  case = resnet_weights.TRAIN_CASE
  logits, updates = forward(case, jnp.float64, train=True)
  assert_close(logits, GOLDEN["train"], 1e-10)
  ours = torch_names.flax_to_torch(updates)
  # Pixels of the norm's map: 2 images of 16 x 13, halved once in layer2.
  counts = {"bn1": 2 * 16 * 13, "layer2.0.downsample.1": 2 * 8 * 7}
  for name in resnet_weights.TRAIN_STATISTICS:
    old, new = 0.9 * weights(case)[name], ours[name]
    if name.endswith("var"):
      n = counts[name.removesuffix(".running_var")]
      new = old + (new - old) * n / (n - 1)
    assert_close(new, GOLDEN[name], 1e-10)


def test_evaluation_leaves_the_statistics_alone():
  case = resnet_weights.TRAIN_CASE
  _, updates = forward(case, jnp.float64)
  for name, array in torch_names.flax_to_torch(updates).items():
    np.testing.assert_array_equal(array, weights(case)[name])


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_torchs(case, dtype):
  torch = pytest.importorskip("torch")
  from tests.oracles import torch_resnet

  images = resnet_weights.images(2, *CASES[case][2], 3)
  is_double = dtype == jnp.float64
  expected = torch_resnet.forward(
    weights(case),
    images,
    dtype=torch.float64 if is_double else torch.float32,
  )
  tolerance = 1e-10 if is_double else 1e-4
  assert_close(forward(case, dtype)[0], expected.logits, tolerance)


@pytest.mark.parametrize("case", ["18_imagenet", "50_small"])
def test_all_training_statistics_equal_torchs(case):
  pytest.importorskip("torch")
  from tests.oracles import torch_resnet

  images = resnet_weights.images(2, *CASES[case][2], 3)
  expected = torch_resnet.forward(weights(case), images, train=True)
  logits, updates = forward(case, jnp.float64, train=True)
  assert_close(logits, expected.logits, 1e-8)
  for name, new in torch_names.flax_to_torch(updates).items():
    if name.endswith("var"):
      n = expected.counts[name.removesuffix(".running_var")]
      old = 0.9 * weights(case)[name]
      new = old + (new - old) * n / (n - 1)
    assert_close(new, expected.state[name], 1e-8)


def test_bfloat16_computes_roughly_the_same_and_gives_float32_logits():
  logits, _ = forward("18_small", jnp.bfloat16)
  assert logits.dtype == np.float32
  assert_close(logits, GOLDEN["18_small"], 0.05)


def test_parameters_are_float32_where_the_computation_is_bfloat16():
  model = resnet.make(depth=18, num_classes=10, dtype=jnp.bfloat16)
  with jax.numpy_dtype_promotion("standard"):
    variables = jax.eval_shape(
      model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))
    )
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {
    np.dtype("float32")
  }


def test_a_type_may_be_given_by_name():
  model = resnet.make(depth=18, num_classes=10, dtype="bfloat16")
  with jax.numpy_dtype_promotion("standard"):
    logits, _ = jax.eval_shape(
      model.init_with_output, jax.random.key(0), jnp.zeros((1, 32, 32, 3))
    )
  assert logits.dtype == np.float32


def test_a_backbone_may_use_the_maps_alone():
  class Backbone(nn.Module):
    @nn.compact
    def __call__(self, images):
      conv = functools.partial(layers.convolution, dtype=jnp.float32)
      norm = functools.partial(
        layers.batch_norm, train=False, epsilon=1e-5, dtype=jnp.float32
      )
      return resnet.feature_maps(images, 50, conv, norm)

  maps, variables = jax.eval_shape(
    Backbone().init_with_output,
    jax.random.key(0),
    jnp.zeros((2, 64, 57, 3)),
  )
  assert [tuple(x.shape) for x in maps] == [
    (2, 16, 15, 256),
    (2, 8, 8, 512),
    (2, 4, 4, 1024),
    (2, 2, 2, 2048),
  ]
  whole = trees.flatten(shapes(depth=50, num_classes=10)).keys()
  head = {"params/fc/kernel", "params/fc/bias"}
  assert trees.flatten(variables).keys() == whole - head


def test_kernels_start_with_kaimings_variance():
  conv = layers.convolution(3, 128, 1, dtype=jnp.float32, name="conv1")
  variables = conv.init(jax.random.key(0), jnp.zeros((1, 8, 8, 32)))
  kernel = np.asarray(variables["params"]["kernel"])
  assert kernel.shape == (3, 3, 32, 128)
  np.testing.assert_allclose(kernel.var(), 2 / (3 * 3 * 128), rtol=0.03)
  assert np.abs(kernel).max() > 3.5 * kernel.std()  # not truncated


def test_compressed_kernels_need_no_code_of_their_own():
  settings = {"depth": 18, "num_classes": 10, "stem": "small"}
  model = resnet.make(**settings)
  images = jnp.asarray(resnet_weights.images(2, 8, 8, 3), jnp.float32)
  variables = resnet.load_torch(weights("18_small"), shapes(**settings))
  rng = np.random.default_rng(0)
  spec = blocks.BlockSpec(1)
  nodes = {}
  for path, leaf in trees.flatten(variables).items():
    if path.endswith("kernel"):
      c_out, m, size = spec.layout(leaf.shape)
      codebook = rng.normal(0, 0.1, (16, size)).astype(np.float32)
      codes = rng.integers(0, 16, (c_out, m)).astype(np.uint8)
      nodes[path] = vq_array.VQArray(
        jnp.asarray(codebook), jnp.asarray(codes), leaf.shape, spec
      )
  compressed = trees.replace(variables, nodes)
  apply = quick.jit(model.apply)
  logits = apply(compressed, images)
  assert_close(logits, apply(vq_array.decode_params(compressed), images), 1e-5)
  assert float(jnp.abs(logits - apply(variables, images)).max()) > 1e-3


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("depth", 20),
    ("depth", "18"),
    ("num_classes", 0),
    ("num_classes", "10"),
    ("stem", "cifar"),
    ("dtype", jnp.int32),
    ("dtype", "float31"),
  ],
)
def test_other_settings_are_refused(name, value):
  settings = {"depth": 18, "num_classes": 10, name: value}
  with pytest.raises(
    errors.InputError, match=f"not support {name}={value!r}; choose"
  ):
    resnet.make(**settings)


def test_another_depth_is_refused():
  template = shapes(depth=50, num_classes=10)
  with pytest.raises(errors.InputError) as caught:
    resnet.load_torch(weights("18_imagenet"), template)
  message = str(caught.value)
  # 53 convolutions instead of 20, each with a norm of four variables.
  assert "165 missing (" in message
  assert "layer1.0.bn3.bias" in message
  assert "and 160 more" in message
  assert "extra" not in message
  assert "layer1.0.conv1.weight is (64, 64, 3, 3)" in message


def test_another_number_of_classes_is_refused_with_both_shapes():
  template = shapes(depth=18, num_classes=1000)
  with pytest.raises(
    errors.InputError,
    match=r"fc\.weight is \(10, 512\), the model has \(1000, 512\)",
  ):
    resnet.load_torch(weights("18_imagenet"), template)


def test_trained_weights_fit(shared_data):
  path = shared_data / "weights" / "resnet18_cifar10.safetensors"
  state_dict = torch_names.read_safetensors(path)
  template = shapes(depth=18, num_classes=10, stem="small")
  variables = resnet.load_torch(state_dict, template)
  assert trees.shapes(variables) == template
  back = torch_names.flax_to_torch(variables)
  assert back.keys() == state_dict.keys()
  for name, array in back.items():
    np.testing.assert_array_equal(array, state_dict[name])

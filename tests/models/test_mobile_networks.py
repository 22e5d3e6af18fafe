"""Laws that hold for MobileNetV2 and EfficientNet-Lite0 alike."""

import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import efficientnet_lite0, mobilenet_v2
from pqf_jax import data, errors, models
from pqf_jax.core import channels
from pqf_jax.core import plan as plans
from pqf_jax.discovery import discover
from pqf_jax.models import torch_names
from pqf_jax.tasks import classification
from tests.models import quick
from tests.oracles import mobile_weights, resnet_weights

# A group that failed the self-check, or an unknown primitive, is a warning.
pytestmark = pytest.mark.filterwarnings("error::UserWarning")

GOLDEN = np.load(
  pathlib.Path(__file__).parents[1] / "goldens" / "mobile_logits.npz"
)
NAMES = ("mobilenet_v2", "efficientnet_lite0")
CONFIGS = {
  "mobilenet_v2": mobilenet_v2.get_config,
  "efficientnet_lite0": efficientnet_lite0.get_config,
}


def make(name, dtype=jnp.float32, num_classes=mobile_weights.NUM_CLASSES):
  return models.get_model(name).make(num_classes=num_classes, dtype=dtype)


@functools.cache
def shapes(name, dtype=jnp.float32, **settings):
  """Returns the variables as shapes, all of one type (Flax makes float32)."""
  init = make(name, **settings).init
  variables = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), variables
  )


@functools.cache
def weights(name):
  return resnet_weights.draw(getattr(mobile_weights, name)())


@functools.cache
def double_variables(name):
  with jax.enable_x64(True):
    template = shapes(name, np.float64)
    variables = models.get_model(name).load_torch(weights(name), template)
    # As NumPy's, which permute without compiling anything.
    return jax.tree.map(np.asarray, variables)


@functools.cache
def jitted(name, dtype, train):
  apply = make(name, dtype).apply
  apply = functools.partial(apply, train=train, mutable=["batch_stats"])
  return quick.jit(apply, optimize=dtype == jnp.float64)


@functools.cache
def forward(name, dtype, train=False):
  """Returns (logits, updates) of our network for the golden file's images."""
  return run(name, double_variables(name), dtype, train)


def run(name, variables, dtype, train=False):
  wide = np.promote_types(dtype, np.float32)
  # Flax's norms mix float32 with other types, which 'strict' forbids.
  promotion = "strict" if dtype == jnp.float32 else "standard"
  with jax.enable_x64(True), jax.numpy_dtype_promotion(promotion):
    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, wide), variables)
    images = resnet_weights.images(*mobile_weights.IMAGE_SHAPE)
    result = jitted(name, dtype, train)(variables, jnp.asarray(images, dtype))
    return jax.tree.map(np.asarray, result)


def assert_close(actual, expected, tolerance):
  """Asserts equality up to `tolerance` of the largest entry."""
  np.testing.assert_allclose(
    actual, expected, rtol=0, atol=tolerance * np.abs(expected).max()
  )


@pytest.mark.parametrize(
  ("name", "num_parameters"),
  [("mobilenet_v2", 3_504_872), ("efficientnet_lite0", 4_652_008)],
)
def test_names_and_shapes_are_those_of_torch(name, num_parameters):
  template = shapes(name, num_classes=1000)
  variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape), template)
  ours = torch_names.flax_to_torch(variables)
  expected = getattr(mobile_weights, name)(1000)
  assert {name: array.shape for name, array in ours.items()} == expected
  sizes = [leaf.size for leaf in jax.tree.leaves(template["params"])]
  assert sum(sizes) == num_parameters


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_that_torch_gave(name):
  logits, updates = forward(name, jnp.float64)
  assert logits.dtype == np.float64
  assert_close(logits, GOLDEN[name], 1e-10)
  assert_close(forward(name, jnp.float32)[0], GOLDEN[name], 1e-4)
  for entry, array in torch_names.flax_to_torch(updates).items():
    np.testing.assert_array_equal(array, weights(name)[entry])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_statistics_of_training_are_torchs(name):
  logits, updates = forward(name, jnp.float64, train=True)
  assert_close(logits, GOLDEN[f"{name}_train"], 1e-8)
  pytest.importorskip("torch")
  from tests.oracles import torch_mobile

  images = resnet_weights.images(*mobile_weights.IMAGE_SHAPE)
  _, net = torch_mobile.FORWARD[name](weights(name), images, train=True)
  for entry, new in torch_names.flax_to_torch(updates).items():
    if entry.endswith("var"):
      # Torch averages the unbiased variance.
      n = net.counts[entry.removesuffix(".running_var")]
      old = 0.9 * weights(name)[entry]
      new = old + (new - old) * n / (n - 1)
    assert_close(new, net.w[entry].numpy(), 1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_torchs(name):
  torch = pytest.importorskip("torch")
  from tests.oracles import torch_mobile

  images = resnet_weights.images(*mobile_weights.IMAGE_SHAPE)
  for dtype, torch_dtype, tolerance in (
    (jnp.float64, torch.float64, 1e-10),
    (jnp.float32, torch.float32, 1e-4),
  ):
    expected, _ = torch_mobile.FORWARD[name](
      weights(name), images, dtype=torch_dtype
    )
    assert_close(forward(name, dtype)[0], expected, tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_keeps_float32_parameters_and_logits(name):
  with jax.numpy_dtype_promotion("standard"):
    logits, variables = jax.eval_shape(
      make(name, "bfloat16").init_with_output,
      jax.random.key(0),
      jnp.zeros((1, 32, 32, 3)),
    )
  types = {leaf.dtype for leaf in jax.tree.leaves((logits, variables))}
  assert types == {np.dtype("float32")}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
  ("setting", "value"),
  [("num_classes", 0), ("num_classes", "10"), ("dtype", jnp.int32)],
)
def test_other_settings_are_refused(name, setting, value):
  settings = {"num_classes": 10, setting: value}
  with pytest.raises(
    errors.InputError, match=f"not support {setting}={value!r}"
  ):
    models.get_model(name).make(**settings)


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_other_classes_are_refused_with_both_shapes(name):
  template = shapes(name, num_classes=1000)
  with pytest.raises(
    errors.InputError, match=r"\(10, 1280\), the model has \(1000, 1280\)"
  ):
    models.get_model(name).load_torch(weights(name), template)


# Channels of the stem, of each later stage's output and of the head; then the
# inner channels of each block but the first, which are the stem's.
SIZES = {
  "mobilenet_v2": [32, 16, 24, 32, 64, 96, 160, 320, 1280]
  + [96, 144, 144, 192, 192, 192, 384, 384, 384, 384, 576, 576, 576]
  + [960, 960, 960],
  "efficientnet_lite0": [32, 16, 24, 40, 80, 112, 192, 320, 1280]
  + [96, 144, 144, 240, 240, 480, 480, 480, 672, 672, 672]
  + [1152, 1152, 1152, 1152],
}


@pytest.mark.parametrize("name", NAMES)
def test_channels_permute_together_and_leave_the_logits(name):
  example = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  axes = discover.infer_channels(make(name).apply, shapes(name), example)
  variables = double_variables(name)
  sizes = channels.group_sizes(variables, axes)
  assert sorted(sizes.values()) == sorted(SIZES[name])
  rng = np.random.default_rng(0)
  permutations = {group: rng.permutation(n) for group, n in sizes.items()}
  permuted = channels.apply_permutations(variables, axes, permutations)
  logits, _ = run(name, permuted, jnp.float64)
  assert_close(logits, GOLDEN[name], 1e-10)

  dropped = dict(axes)
  del dropped[next(filter(is_depthwise, axes))]
  broken = channels.apply_permutations(variables, dropped, permutations)
  logits, _ = run(name, broken, jnp.float32)
  assert np.abs(logits - GOLDEN[name]).max() > 1e-3


def is_depthwise(path):
  return path.endswith(("conv_dw/kernel", "conv/1/0/kernel"))


def test_groups_pass_the_librarys_own_check():
  # The other network has the same primitives, but takes 1.2 GB in float64.
  name, images = "mobilenet_v2", jnp.zeros((1, 16, 16, 3))
  variables = jax.tree.map(np.float32, double_variables(name))
  axes = discover.discover_channels(make(name).apply, variables, images)
  assert len(channels.group_sizes(variables, axes)) == len(SIZES[name])


def size(config):
  template = shapes(config.model.name, num_classes=config.model.num_classes)
  plan = plans.make_plan([plans.Rule(*rule) for rule in config.rules], template)
  return plans.predict_size(plan, template)


@pytest.mark.parametrize(
  ("name", "variant", "payload_bytes"),
  [
    ("mobilenet_v2", "imagenet2012", 1_198_044),
    ("mobilenet_v2", "imagenet2012,large", 785_196),
    ("efficientnet_lite0", "imagenet2012", 1_551_894),
    ("efficientnet_lite0", "imagenet2012,large", 1_017_972),
  ],
)
def test_recipes_give_the_sizes_that_they_name(name, variant, payload_bytes):
  config = CONFIGS[name](variant)
  assert size(config).payload_bytes == payload_bytes
  text = (pathlib.Path(__file__).parents[2] / f"configs/{name}.py").read_text()
  assert f"{payload_bytes:,}" in text
  for row in size(config).layers:
    if row.length and row.shape[2:3] == (1,):
      assert row.length == np.prod(row.shape[:2])  # a sub-vector a channel
      assert row.num_codes >= 32


@pytest.mark.parametrize(
  ("name", "top1", "top5"),
  [("mobilenet_v2", 0.666, 0.898), ("efficientnet_lite0", 0.692, 0.914)],
)
def test_trained_weights_are_as_accurate_as_in_torch(
  shared_data, name, top1, top5
):
  folder = os.environ.get("PQF_JAX_WEIGHTS")
  path = pathlib.Path(folder or "") / f"{name}.safetensors"
  if not folder or not path.is_file():
    pytest.skip(f"PQF_JAX_WEIGHTS names no folder with {path.name}")
  config = CONFIGS[name]()
  dataset = data.get_dataset("imagenet2012", data_dir=shared_data / "tfds")
  preprocess = functools.partial(
    data.normalize,
    mean=config.data.mean or dataset.mean,
    std=config.data.std or dataset.std,
  )
  apply = make(name, num_classes=1000).apply
  evaluate = classification.make_evaluate(apply, preprocess)
  variables = models.get_model(name).load_torch(
    torch_names.read_safetensors(path), shapes(name, num_classes=1000)
  )
  metrics = evaluate(variables, data.eval_batches(dataset, batch_size=100))
  assert metrics["images"] == 500
  # Two images off at most: convolutions add up in another order.
  assert abs(metrics["top1"] - top1) <= 2 / 500 + 1e-9
  assert abs(metrics["top5"] - top5) <= 2 / 500 + 1e-9

"""Rules that a byte budget chooses."""

import itertools
import math
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import pqf_jax
from pqf_jax import budget, errors, models
from pqf_jax.allocation import distortion
from pqf_jax.allocation import options as kernel_options
from pqf_jax.core import blocks
from pqf_jax.discovery import kernels as kernel_discovery

RNG = np.random.default_rng(0)


def convolve(x, kernel):
  return jax.lax.conv_general_dilated(
    x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def conv_net(v, x):
  """A chain of 3x3 convolutions, and a classifier of the mean."""
  for name in sorted(v)[:-1]:
    x = jax.nn.relu(convolve(x, v[name][...]))
  return x.mean((1, 2)) @ v["head"]


def make_net(widths, classes=16):
  """Returns variables of `conv_net`, of any scales, and an input."""
  ends = itertools.pairwise((3, *widths))
  shapes = {f"conv{i}": (3, 3, *end) for i, end in enumerate(ends)}
  shapes["head"] = (widths[-1], classes)
  variables = {
    name: RNG.normal(size=shape).astype(np.float32)
    for name, shape in shapes.items()
  }
  return variables, jax.ShapeDtypeStruct((1, 4, 4, 3), jnp.float32)


NET, X = make_net((16, 32, 32))
DENSE_BYTES = sum(4 * leaf.size for leaf in NET.values())


@pytest.fixture(scope="module")
def by_bytes():
  return {
    target: budget.allocate_bytes(conv_net, NET, X, target_bytes=target)
    for target in (6_000, 9_000, 13_000, 20_000, 35_000)
  }


def test_more_bytes_never_lose_more_and_are_never_exceeded(by_bytes):
  losses = [found.loss for found in by_bytes.values()]
  assert losses == sorted(losses, reverse=True)
  assert losses[-1] < losses[0]
  for target, found in by_bytes.items():
    assert found.size.payload_bytes <= target


def test_rules_give_the_plan_that_was_counted(by_bytes):
  kernels = kernel_discovery.find_kernels(conv_net, NET, X)
  for found in by_bytes.values():
    plan = pqf_jax.make_plan(found.rules, NET, kernels)
    assert pqf_jax.predict_size(plan, NET) == found.size
    assert [rule.pattern for rule in found.rules] == list(kernels)
    assert list(plan) == [x.path for x in found.layers if x.rule.num_codes]


@hypothesis.given(
  st.lists(st.sampled_from([4, 8, 24]), min_size=2, max_size=3),
  st.floats(0, 1),
)
@hypothesis.settings(deadline=None, max_examples=8)
def test_random_networks_get_no_more_than_the_budget(widths, share):
  variables, x = make_net(widths)
  message = ""
  try:
    budget.allocate_bytes(conv_net, variables, x, target_bytes=1)
  except errors.InputError as error:
    message = str(error)
  if "can be compressed" in message:
    return
  least, most = (
    int(text.replace(",", ""))
    for text in re.search(r"takes ([\d,]+) to ([\d,]+)", message).groups()
  )
  target = least + int(share * (most - least))
  found = budget.allocate_bytes(conv_net, variables, x, target_bytes=target)
  assert found.size.payload_bytes <= target


def test_no_other_choice_of_three_layers_loses_less():
  variables, x = make_net((16, 16), classes=32)
  target = 7_000
  found = budget.allocate_bytes(conv_net, variables, x, target_bytes=target)
  kernels = kernel_discovery.find_kernels(conv_net, variables, x)
  every = {
    path: kernel_options.list_options(variables[path], axes, 1000)
    for path, axes in kernels.items()
  }
  noise = {
    path: distortion.noise_to_signal(
      kernel_options.option_distortions(variables[path], options)
    )
    for path, options in every.items()
  }
  losses = {}
  for picked in itertools.product(*(range(len(o)) for o in every.values())):
    chosen = dict(zip(every, picked, strict=True))
    plan = kernel_options.plan_of({p: every[p][i] for p, i in chosen.items()})
    size = pqf_jax.predict_size(plan, variables).payload_bytes
    losses[picked] = (
      size <= target,
      sum(noise[path][i] for path, i in chosen.items()),
    )
  least = min(loss for fits, loss in losses.values() if fits)
  assert found.loss == pytest.approx(least)
  assert sum(fits for fits, _ in losses.values()) > 20


def test_measured_weights_move_bytes_to_the_kernels_that_matter():
  # The outputs of the second branch are a thousandth of the first's.
  variables = {
    name: RNG.normal(size=(32, 64)).astype(np.float32) for name in "ab"
  }
  x = RNG.normal(size=(64, 32)).astype(np.float32)

  def apply_fn(v, x):
    return x @ v["a"] + 1e-3 * x @ v["b"]

  def sizes(batches):
    found = budget.allocate_bytes(
      apply_fn, variables, x, target_ratio=6, batches=batches
    )
    return [layer.payload_bytes for layer in found.layers]

  equal, measured = sizes(()), sizes([(x,)])
  assert equal[0] == pytest.approx(equal[1], rel=0.2)
  assert measured[0] > 2 * measured[1]


def test_padding_has_no_part_in_the_weights():
  variables = {
    name: RNG.normal(size=(32, 64)).astype(np.float32) for name in "ab"
  }
  x = RNG.normal(size=(8, 6, 32)).astype(np.float32)
  padded = np.concatenate([x, np.full((8, 4, 32), np.inf, np.float32)], 1)

  def apply_fn(v, x):
    return x @ v["a"] + 1e-3 * x @ v["b"]

  def weights(x, mask_fn):
    found = budget.allocate_bytes(
      apply_fn,
      variables,
      x,
      target_ratio=6,
      batches=[(x,)],
      mask_fn=mask_fn,
    )
    first, second = (layer.weight for layer in found.layers)
    return first / second

  with pytest.raises(errors.InputError, match="NaN or infinite"):
    weights(padded, None)
  found = weights(padded, lambda x: np.isfinite(x[..., 0]))
  assert found == pytest.approx(weights(x, None), rel=1e-4)


def zeros(tree):
  """Returns arrays of zeros that need no memory."""
  return jax.tree.map(
    lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), tree
  )


def make_model(name, inputs, **settings):
  return prepare(models.get_model(name).make(**settings), inputs)


def prepare(network, inputs):
  x = jax.ShapeDtypeStruct(*inputs)
  shapes = jax.eval_shape(network.init, jax.random.key(0), x)
  return network.apply, zeros(shapes), x


PHOTO = (1, 64, 64, 3), jnp.float32
NETWORKS = {
  "ResNet-18": lambda: make_model(
    "resnet", PHOTO, depth=18, num_classes=1000, stem="imagenet"
  ),
  "ResNet-50": lambda: make_model(
    "resnet", PHOTO, depth=50, num_classes=1000, stem="imagenet"
  ),
  "MobileNetV2": lambda: make_model("mobilenet_v2", PHOTO, num_classes=1000),
  "MiniLM-L6": lambda: make_model("bert", ((1, 8), jnp.int32)),
  "ViT-B": lambda: prepare(
    models.get_model("vit").make(), ((1, 224, 224, 3), jnp.float32)
  ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_ratios_are_met_on_large_networks(
  name: str, monkeypatch: pytest.MonkeyPatch
):
  def gaussian(kernel, spec, bits):  # what no code of the rate goes below
    return 4.0 ** (-np.arange(bits + 1) / spec.layout(kernel.shape)[2])

  monkeypatch.setattr(distortion, "predict_distortions", gaussian)
  apply_fn, variables, x = NETWORKS[name]()
  found = budget.allocate_bytes(apply_fn, variables, x, target_ratio=30)
  assert 30 <= found.size.ratio <= 1.03 * 30


@pytest.mark.parametrize(
  ("targets", "message"),
  [
    ({}, "target_ratio is None and target_bytes None; give one"),
    ({"target_ratio": 8, "target_bytes": 9}, "give one of them"),
    ({"target_ratio": 0}, "a number above 0"),
    ({"target_ratio": math.nan}, "a number above 0"),
    ({"target_bytes": "9k"}, "target_bytes '9k'"),
    ({"target_ratio": 1e6}, r"the target is 0 bytes; .* takes [\d,]+ to"),
    ({"target_ratio": 1}, "when compressed"),
    ({"target_bytes": DENSE_BYTES}, "when compressed"),
  ],
)
def test_targets_that_cannot_be_met_are_refused(targets, message):
  with pytest.raises(errors.InputError, match=message):
    budget.auto_rules(conv_net, NET, X, **targets)


def test_a_function_that_ignores_its_variables_is_refused():
  with pytest.raises(errors.InputError, match="there is nothing to compress"):
    budget.auto_rules(lambda _, x: conv_net(NET, x), NET, X, target_ratio=2)


def test_variables_without_a_choice_are_refused():
  small = {"conv0": np.ones((3, 3, 3, 4)), "head": np.ones((4, 2))}
  with pytest.raises(errors.InputError, match="of 2 kernels none can be"):
    budget.auto_rules(conv_net, small, X, target_ratio=2)
  broken = {**NET, "head": np.full_like(NET["head"], np.nan)}
  with pytest.raises(errors.InputError, match="head has 512 NaN"):
    budget.auto_rules(conv_net, broken, X, target_ratio=10)
  with pytest.raises(errors.InputError, match="give arrays with values"):
    budget.auto_rules(conv_net, jax.eval_shape(lambda: NET), X, target_ratio=10)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (
      {"batches": [np.ones((2, 4, 4, 3))]},
      "batch 0 of batches is of type ndarray",
    ),
    ({"batches": None}, "batches is of type NoneType"),
    ({"batches": [(X,)]}, "of batches, leaf '0', is of type ShapeDtypeStruct"),
    ({"batches": [(np.ones((2, 4, 4, 5)),)]}, "cannot be traced"),
    ({"kmeans_steps": 0}, "kmeans_steps=0"),
    ({"storage": "int8"}, "int8"),
  ],
)
def test_settings_that_fit_nothing_are_refused(settings, message):
  with pytest.raises(errors.InputError, match=message):
    budget.auto_rules(conv_net, NET, X, target_ratio=6, **settings)


def test_outputs_that_tell_nothing_are_refused():
  """All kernels would count nothing, and get the fewest bytes there are."""

  def classify(variables, x):
    return (x @ variables["w"]).argmax(-1)

  x = np.ones((2, 16), np.float32)
  variables = {"w": RNG.normal(size=(16, 64)).astype(np.float32)}
  with pytest.raises(errors.InputError, match="return floats, such as logits"):
    budget.auto_rules(classify, variables, x, target_ratio=4, batches=[(x,)])


def test_small_first_layers_and_integers_stay_dense():
  def apply_fn(v, x):
    return (x @ v["stem"]) @ v["body"] @ v["counts"].astype(jnp.float32)

  variables = {
    "stem": np.ones((4, 64), np.float32),
    "body": RNG.normal(size=(64, 4096)).astype(np.float32),
    "counts": np.ones((4096, 16), np.int32),
  }
  found = budget.allocate_bytes(
    apply_fn, variables, jnp.ones((1, 4)), target_ratio=3
  )
  assert [layer.path for layer in found.layers if layer.rule.num_codes] == [
    "body"
  ]


def test_kernels_that_a_layer_cannot_read_compressed_stay_dense():
  def apply_fn(v, x):
    return jax.lax.dot(x @ v["a"], v["b"]) @ v["c"]

  variables = {
    name: RNG.normal(size=(32, 32)).astype(np.float32) for name in "abc"
  }
  with pytest.warns(match="1 kernels stay dense, such as b, .*decode_params"):
    found = budget.allocate_bytes(
      apply_fn, variables, jnp.ones((1, 32)), target_ratio=2
    )
  assert [layer.path for layer in found.layers if layer.rule.num_codes] == [
    "a",
    "c",
  ]


def test_stacked_layers_count_each():
  def apply_fn(v, x):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, v["stack"])
    return x @ v["head"]

  variables = {
    "stack": RNG.normal(size=(5, 32, 32)).astype(np.float32),
    "head": RNG.normal(size=(32, 32)).astype(np.float32),
  }
  x = jnp.ones((1, 32))
  found = budget.allocate_bytes(apply_fn, variables, x, target_ratio=6)
  weights = {layer.path: layer.weight for layer in found.layers}
  assert weights == {"head": 1, "stack": 5}
  kernels = kernel_discovery.find_kernels(apply_fn, variables, x)
  plan = pqf_jax.make_plan(found.rules, variables, kernels)
  assert pqf_jax.predict_size(plan, variables) == found.size


def test_rules_say_axes_that_names_do_not_tell():
  def apply_fn(v, x):
    return x @ v["kernel"].T

  variables = {"kernel": RNG.normal(size=(64, 32)).astype(np.float32)}
  found = budget.allocate_bytes(
    apply_fn, variables, jnp.ones((1, 32)), target_ratio=6
  )
  assert found.rules[0].axes == blocks.KernelAxes((1,), (0,))
  plan = pqf_jax.make_plan(found.rules, variables)
  assert pqf_jax.predict_size(plan, variables) == found.size


def test_table_of_the_layers(by_bytes):
  found = by_bytes[9_000]
  *_, last = lines = str(found).splitlines()
  assert len(lines) == len(found.layers) + 4
  assert f"{found.size.payload_bytes:,}" in lines[-2]
  assert last == f"{found.size.ratio:.1f} times smaller"


def test_patterns_of_rules_match_their_kernel_only():
  def apply_fn(v, x):
    return (x @ v["a.b"]) @ v["aub"] @ v["z"]

  variables = {
    name: RNG.normal(size=(32, 32)).astype(np.float32)
    for name in ("a.b", "aub", "z")
  }
  rules = budget.auto_rules(
    apply_fn, variables, jnp.ones((1, 32)), target_ratio=6
  )
  paths = ["a.b", "aub", "z"]
  assert [
    [path for path in paths if re.fullmatch(rule.pattern, path)]
    for rule in rules
  ] == [[path] for path in paths]

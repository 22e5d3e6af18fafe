"""Calibration of whole networks: laws that the outputs must obey."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pqf_jax import calibrate, errors, quantize
from pqf_jax.core import blocks, trees
from pqf_jax.core import plan as plans
from pqf_jax.discovery import kernels
from tests.inference import coded

RULES = [
  plans.Rule("params/stem/kernel", None),
  plans.Rule(".*/kernel", 16, 2, 5),
]


class Network(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    x = nn.relu(nn.Conv(8, (3, 3), name="stem")(x))
    x = nn.Conv(16, (3, 3), strides=2, use_bias=False, name="conv")(x)
    x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
    return nn.Dense(6, name="fc")(nn.relu(x).mean((1, 2)))


@pytest.fixture(scope="module")
def case():
  """A network, its quantized variables, and batches of smooth images."""
  model = Network()
  noise = jax.random.normal(jax.random.key(0), (4, 8, 4, 4, 3))
  images = jax.image.resize(noise, (4, 8, 8, 8, 3), "linear")
  variables = model.init(jax.random.key(1), images[0])
  # Statistics that fit the images.
  _, updates = model.apply(
    variables, images.reshape(-1, 8, 8, 3), True, mutable=["batch_stats"]
  )
  variables = jax.tree.map(lambda x: x, variables | dict(updates))
  plan = plans.make_plan(RULES, variables)
  quantized, _ = quantize.quantize_params(jax.random.key(2), variables, plan)
  return model, variables, quantized, [(batch,) for batch in images]


def _error(model, variables, others, batches):
  wanted, given = (
    np.concatenate([model.apply(v, *batch) for batch in batches])
    for v in (variables, others)
  )
  return np.sum((wanted - given) ** 2) / np.sum((wanted - wanted.mean(0)) ** 2)


@pytest.fixture(scope="module")
def calibrated(case):
  model, variables, quantized, batches = case
  return calibrate.calibrate_params(model.apply, variables, quantized, batches)


def test_outputs_come_near_those_of_the_dense_network(case, calibrated):
  model, variables, quantized, batches = case
  before = _error(model, variables, quantized, batches)
  after = _error(model, variables, calibrated[0], batches)
  assert after < 0.3 * before


def test_every_layer_improves_and_is_named(case, calibrated):
  _, _, quantized, _ = case
  variables, layers = calibrated
  assert set(layers) == {"params/conv/kernel", "params/fc/kernel"}
  assert all(layer.after < layer.before for layer in layers.values())
  assert jax.tree.structure(variables) == jax.tree.structure(quantized)
  types = [
    [leaf.dtype for leaf in jax.tree.leaves(tree)]
    for tree in (variables, quantized)
  ]
  assert types[0] == types[1]


def test_an_unchanged_network_stays_as_it_is(case):
  model, variables, _, batches = case
  same, layers = calibrate.calibrate_params(
    model.apply, variables, variables, batches
  )
  assert not layers
  jax.tree.map(np.testing.assert_array_equal, same, variables)


def test_norms_and_biases_alone_keep_the_codes(case):
  model, variables, quantized, batches = case
  matched, layers = calibrate.calibrate_params(
    model.apply, variables, quantized, batches, reconstruct=False
  )
  assert not layers
  for path, leaf in trees.flatten(quantized).items():
    if path.endswith(("codes", "codebook")):
      np.testing.assert_array_equal(trees.flatten(matched)[path], leaf)
  # Outputs of the norm and of the last bias have the dense network's moments.
  for layer in ("norm", "fc"):
    values = [
      np.concatenate(
        [
          model.apply(v, *batch, capture_intermediates=True)[1][
            "intermediates"
          ][layer]["__call__"][0].reshape(-1, size)
          for batch in batches
        ]
      )
      for v in (variables, matched)
      for size in [16 if layer == "norm" else 6]
    ]
    means = [value.mean(0) for value in values]
    np.testing.assert_allclose(*means, atol=2e-5)
    if layer == "norm":
      np.testing.assert_allclose(*(v.std(0) for v in values), rtol=1e-3)


def test_kernels_of_loops_and_tied_ones_keep_their_codes():
  def network(variables, x):
    params = variables["params"]
    x = x @ params["tied"]["kernel"][...]
    x = x @ params["tied"]["kernel"][...]
    looped = params["looped"]["kernel"][...]
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ looped), None), x, length=2)[
      0
    ]

  kernels = jax.random.normal(jax.random.key(0), (2, 8, 8))
  variables = {
    "params": {
      "tied": {"kernel": kernels[0]},
      "looped": {"kernel": kernels[1]},
    }
  }
  plan = plans.make_plan([plans.Rule(".*", 4, 2, 3)], variables)
  quantized, _ = quantize.quantize_params(jax.random.key(0), variables, plan)
  x = jax.random.normal(jax.random.key(1), (16, 8))
  same, layers = calibrate.calibrate_params(
    network, variables, quantized, [(x,)]
  )
  assert not layers
  jax.tree.map(np.testing.assert_array_equal, same, quantized)


def test_bad_input_is_refused(case):
  model, variables, quantized, batches = case

  def refused(message, batches=batches, dense=variables, **settings):
    with pytest.raises(errors.InputError, match=message):
      calibrate.calibrate_params(
        model.apply, dense, quantized, batches, **settings
      )

  ((images,), *_) = batches
  refused("batches is empty", [])
  refused("batches is of type generator", (batch for batch in batches))
  refused("batch 0 of batches is of type", [images])
  refused("batch 1 .* other shapes", [batches[0], (images[:2],)])
  refused("batch 0 of batches has NaN", [(images * jnp.nan,)])
  refused("give NaN, infinite or too large", [(images * jnp.inf,)])
  refused("rounds is -1", rounds=-1)
  for damping in (0.0, float("nan"), 2.0):
    refused(f"damping {damping}", damping=damping)
  smaller = trees.replace(variables, {"params/fc/bias": jnp.zeros(5)})
  refused("params/fc/bias has shape", dense=smaller)


def test_one_bias_for_all_channels_stays_as_it_is():
  """It cannot give each of them its mean."""

  def network(variables, x):
    return x @ variables["w"] + variables["b"][None]

  kernel = coded.make_kernel(0, (8, 6), num_codes=4, channels=2)
  rng = np.random.default_rng(1)
  dense = {"w": jnp.asarray(rng.normal(size=(8, 6)), jnp.float32)}
  bias = {"b": jnp.ones(1)}
  given, layers = calibrate.calibrate_params(
    network, dense | bias, {"w": kernel} | bias, [(jnp.eye(8),)]
  )
  assert list(layers) == ["w"]
  np.testing.assert_array_equal(given["b"], bias["b"])


def test_what_no_norm_or_bias_shows_is_refused():
  """Without these, nothing else would see that the numbers are not finite."""

  def network(variables, x):
    return x @ variables["w"]

  kernel = coded.make_kernel(0, (8, 6), num_codes=4, channels=2)
  dense = {"w": kernel.decode()}
  for weights, x, message in (
    (dense["w"], jnp.full((4, 8), jnp.inf), "too large values before w"),
    (dense["w"] * jnp.nan, jnp.ones((4, 8)), "w has 48 NaN or infinite"),
  ):
    with pytest.raises(errors.InputError, match=message):
      calibrate.calibrate_params(network, {"w": weights}, {"w": kernel}, [(x,)])


def quantize_coarsely(model, variables, sample):
  """Returns variables whose kernels have four codewords of two channels."""
  found = kernels.find_kernels(model.apply, variables, sample)
  plan = plans.make_plan([plans.Rule(".*", 4, 2, 5)], variables, found)
  return quantize.quantize_params(jax.random.key(2), variables, plan)[0]


class Attention(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.MultiHeadDotProductAttention(2, use_bias=False, name="heads")(x)


def test_attention_kernels_are_rebuilt_along_their_axes():
  model = Attention()
  noise = jax.random.normal(jax.random.key(0), (2, 16, 4, 2))
  x = jnp.concatenate([noise, noise @ jnp.ones((2, 6))], -1)  # of low rank
  variables = model.init(jax.random.key(1), x[0])
  quantized = quantize_coarsely(model, variables, x[0])
  batches = [(batch,) for batch in x]
  given, layers = calibrate.calibrate_params(
    model.apply, variables, quantized, batches
  )
  assert set(layers) == {
    f"params/heads/{name}/kernel" for name in ("query", "key", "value", "out")
  }
  before = _error(model, variables, quantized, batches)
  assert _error(model, variables, given, batches) < 0.3 * before


class Layer(nn.Module):
  @nn.compact
  def __call__(self, x, _=None):
    y = nn.MultiHeadDotProductAttention(2, name="heads")(nn.LayerNorm()(x))
    return x + nn.Dense(x.shape[-1], name="dense")(jnp.tanh(y)), y


def scanned(axis, length):
  return nn.scan(
    Layer,
    variable_axes={"params": axis},
    split_rngs={"params": True},
    length=length,
  )(name="layers")


def layer_of(tree, axis, i):
  """Returns one layer of stacked variables."""
  return jax.tree.map(lambda leaf: jnp.take(leaf, i, axis), tree)


@pytest.mark.parametrize(("axis", "length"), [(0, 2), (1, 2), (0, 1)])
def test_layers_of_a_scan_are_calibrated_like_layers_apart(axis, length):
  model = scanned(axis, length)
  x = jax.random.normal(jax.random.key(0), (2, 16, 4, 8))
  variables = model.init(jax.random.key(1), x[0])
  # Biases that are not zero.
  variables = jax.tree.map(lambda leaf: leaf + 0.01, variables)
  quantized = quantize_coarsely(model, variables, x[0])
  batches = [(batch,) for batch in x]
  together, found = calibrate.calibrate_params(
    model.apply, variables, quantized, batches
  )

  def chain(layers, x):
    states = []
    for i in range(length):
      x, y = Layer().apply({"params": layers[i]}, x)
      states.append(y)
    return x, jnp.stack(states)

  def split(tree):
    return [layer_of(tree["params"], axis, i) for i in range(length)]

  apart, alone = calibrate.calibrate_params(
    chain, split(variables), split(quantized), batches
  )
  assert len(found) == len(alone) == 5 * length
  jax.tree.map(
    lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5),
    split(together),
    apart,
  )
  one, other = (
    trees.flatten(tree)["params/heads/query/bias"]
    for tree in (quantized, together)
  )
  assert np.abs(one - other).max() > 0


def test_a_table_of_positions_is_corrected_like_a_bias():
  def network(p, x):
    return x @ p["kernel"][...] + p["positions"]

  kernel, *xs = jax.random.normal(jax.random.key(0), (3, 8, 8))
  variables = {"kernel": kernel, "positions": jnp.ones((1, 2, 8))}
  plan = plans.make_plan([plans.Rule(".*", 4, 2, 3)], variables)
  quantized, _ = quantize.quantize_params(jax.random.key(0), variables, plan)
  batches = [(x.reshape(4, 2, 8),) for x in xs]
  given, _ = calibrate.calibrate_params(network, variables, quantized, batches)
  means = [
    np.mean([network(p, *batch) for batch in batches], (0, 1))
    for p in (variables, given)
  ]
  np.testing.assert_allclose(*means, atol=1e-5)


def pooled(p, x, mask):
  """A mean over positions, of which a mask says which there are."""
  h = jnp.tanh(x @ p["up"][...] + p["bias"][None, None])
  sums = jnp.einsum("btf,bt->bf", h, mask.astype(jnp.float32))
  return sums / mask.sum(1, dtype=jnp.float32)[:, None] @ p["head"][...]


@pytest.fixture
def padded():
  """Variables, quantized ones, batches without and with padding."""
  rng = np.random.default_rng(0)
  nodes = {
    "up": coded.make_kernel(0, (8, 6), num_codes=4, channels=2),
    "head": coded.make_kernel(1, (6, 4), num_codes=4, channels=2),
  }
  noise = {
    name: jnp.asarray(0.2 * rng.normal(size=node.shape), jnp.float32)
    for name, node in nodes.items()
  }
  bias = {"bias": jnp.ones(6)}
  dense = {name: nodes[name].decode() + noise[name] for name in nodes}
  x = jnp.asarray(rng.normal(size=(2, 8, 4, 8)), jnp.float32)
  whole = [(batch, jnp.ones(batch.shape[:2], bool)) for batch in x]
  # What stands in padded positions is larger than all else.
  longer = [
    (
      jnp.pad(batch, ((0, 0), (0, 3), (0, 0)), constant_values=5),
      jnp.pad(mask, ((0, 0), (0, 3))),
    )
    for batch, mask in whole
  ]
  return dense | bias, nodes | bias, whole, longer


def test_padding_does_not_count(padded):
  dense, quantized, whole, longer = padded
  results = [
    calibrate.calibrate_params(
      pooled, dense, quantized, batches, mask_fn=mask_fn
    )
    for batches, mask_fn in (
      (whole, None),
      (longer, lambda x, mask: mask),
      (longer, None),
    )
  ]
  (wanted, layers), (given, others), (wrong, _) = results
  for path, layer in layers.items():
    np.testing.assert_allclose(others[path].after, layer.after, rtol=1e-4)
    np.testing.assert_array_equal(given[path].codes, wanted[path].codes)
    np.testing.assert_allclose(
      given[path].codebook, wanted[path].codebook, atol=1e-4
    )
  np.testing.assert_allclose(given["bias"], wanted["bias"], atol=1e-5)
  assert np.abs(wrong["bias"] - wanted["bias"]).max() > 0.01


def test_padding_may_be_no_number(padded):
  dense, quantized, whole, longer = padded

  def undefined(p, x, mask):
    ones = mask[..., None].astype(jnp.float32)
    h = x / ones @ p["up"][...] + p["bias"][None, None]
    sums = jnp.where(mask[..., None], jnp.tanh(h), 0).sum(1)
    return sums / ones.sum(1) @ p["head"][...]

  wanted, given = (
    calibrate.calibrate_params(
      network, dense, quantized, batches, mask_fn=lambda x, mask: mask
    )[0]
    for network, batches in ((pooled, whole), (undefined, longer))
  )
  for path in ("up", "head"):
    np.testing.assert_array_equal(given[path].codes, wanted[path].codes)
  np.testing.assert_allclose(given["bias"], wanted["bias"], atol=1e-5)


def test_masks_are_of_positions(padded):
  dense, quantized, _, longer = padded
  for mask_fn, message in (
    (lambda x, mask: mask.astype(int), r"gives int32 \[8, 7\] with 32"),
    (lambda x, mask: mask & False, "with 0 positions that count"),
    (lambda x, mask: mask.T, r"a mask \[7, 8\], but no layer has inputs"),
  ):
    with pytest.raises(errors.InputError, match=message):
      calibrate.calibrate_params(
        pooled, dense, quantized, longer, mask_fn=mask_fn
      )


class SharedHead(nn.Module):
  """As detectors have it: the same two layers on maps of several sizes."""

  @nn.compact
  def __call__(self, x):
    smooth = nn.Conv(8, (1, 1), use_bias=False, name="stem")
    conv, score = nn.Conv(8, (3, 3), name="conv"), nn.Conv(6, (1, 1), name="fc")
    maps = [smooth(x), smooth(x[:, ::2, ::2])]
    return jnp.concatenate(
      [score(nn.relu(conv(y))).reshape(len(x), -1, 6) for y in maps], 1
    )


def test_a_head_of_several_maps_suits_all_of_them():
  model = SharedHead()
  noise = jax.random.normal(jax.random.key(0), (2, 8, 4, 4, 4))
  images = jax.image.resize(noise, (2, 8, 8, 8, 4), "linear")
  variables = model.init(jax.random.key(1), images[0])
  quantized = quantize_coarsely(model, variables, images[0])
  batches = [(batch,) for batch in images]
  given, layers = calibrate.calibrate_params(
    model.apply, variables, quantized, batches
  )
  assert set(layers) >= {"params/conv/kernel", "params/fc/kernel"}
  wanted, before, after = (
    np.concatenate([model.apply(v, *batch) for batch in batches])
    for v in (variables, quantized, given)
  )
  for part in (slice(64), slice(64, None)):  # each map
    errors_of = [
      np.square(wanted[:, part] - x[:, part]).sum() for x in (before, after)
    ]
    assert errors_of[1] < 0.7 * errors_of[0]
  # The last bias gives the outputs the means that they had, over all maps.
  np.testing.assert_allclose(
    *(x.mean((0, 1)) for x in (wanted, after)),
    atol=1e-5,
  )


def test_a_transposed_convolution_without_overlap_is_rebuilt():
  def network(variables, x):
    return jnp.einsum("nhwc,abco->nhawbo", x, variables["kernel"][...])

  noise = jax.random.normal(jax.random.key(0), (16, 3, 3, 3))
  x = noise @ jax.random.normal(jax.random.key(1), (3, 8))  # of low rank
  kernel = jax.random.normal(jax.random.key(2), (2, 2, 8, 6))
  axes = blocks.KernelAxes(inputs=(2,), outputs=(3,))
  plan = plans.make_plan([plans.Rule(".*", 8, 1, 5, axes)], {"kernel": kernel})
  quantized, _ = quantize.quantize_params(
    jax.random.key(0), {"kernel": kernel}, plan
  )
  given, layers = calibrate.calibrate_params(
    network, {"kernel": kernel}, quantized, [(x,)]
  )
  # The predicted errors are those of the outputs.
  wanted, *outputs = (
    network(v, x) for v in ({"kernel": kernel}, quantized, given)
  )
  before, after = (
    np.square(wanted - y).sum() / np.square(wanted).sum() for y in outputs
  )
  assert after < 0.5 * before
  found = layers["kernel"]
  np.testing.assert_allclose([found.before, found.after], [before, after], 0.02)


def test_taps_that_see_padding_alone_follow_the_kernel(case):
  model, variables, quantized, batches = case
  pixels = [(batch[:, :1, :1],) for (batch,) in batches]
  found, layers = calibrate.calibrate_params(
    model.apply, variables, quantized, pixels
  )
  layer = layers["params/conv/kernel"]
  assert layer.after < 0.5 * layer.before
  node = found["params"]["conv"]["kernel"]
  vectors, codebook, codes = map(
    np.asarray,
    (
      node.spec.to_blocks(variables["params"]["conv"]["kernel"]),
      node.codebook,
      node.codes,
    ),
  )
  # Only the middle one of nine taps, in each of a sub-vector's two channels,
  # sees the map's one place.
  unseen = np.delete(np.arange(18), [4, 13])
  for code in np.unique(codes):
    mean = vectors[codes == code].mean(0)
    np.testing.assert_allclose(
      codebook[code, unseen].astype(np.float32), mean[unseen], atol=1e-2
    )

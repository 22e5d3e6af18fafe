import hashlib
import importlib
import json
import os
import pathlib
import subprocess
import sys
import tracemalloc

import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import strategies as st

from pqf_jax import errors, pack
from pqf_jax.core import blocks, trees, vq_array
from pqf_jax.core import plan as plans
from pqf_jax.core import storage as storages
from pqf_jax.packing import container, header
from pqf_jax.pipeline import job, planning
from tests.packing import test_structure

GOLDENS = pathlib.Path(__file__).parent / "goldens"
EPSILON = 0.1


class Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Conv(8, (3, 3), use_bias=False, name="conv")(x)
    # A large epsilon shows a fold that forgets it.
    norm = nn.BatchNorm(use_running_average=True, epsilon=EPSILON, name="bn")
    return nn.Dense(5, name="fc")(nn.relu(norm(x)).mean((1, 2)))


RULES = (
  plans.Rule("params/conv/kernel", 8),
  plans.Rule("params/fc/kernel", 4, channels=2),
)


def _random(tree, seed=0):
  """Random leaves, so that norms have unequal statistics."""
  rng = np.random.default_rng(seed)

  def draw(leaf):
    return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)

  return jax.tree.map(draw, tree)


def quantized(shape, num_codes, spec, dtype=np.float32, scale=1.0):
  """A kernel with random codes, and a codebook that float16 holds exactly."""
  rng = np.random.default_rng(1)
  c_out, m, length = spec.layout(shape)
  codebook = rng.normal(size=(num_codes, length)).astype(np.float16)
  return vq_array.VQArray(
    (codebook.astype(np.float64) * scale).astype(dtype),
    rng.integers(0, num_codes, (c_out, m)).astype(
      vq_array.code_dtype(num_codes)
    ),
    shape,
    spec,
  )


KERNEL = quantized((4, 6), 4, blocks.BlockSpec(2))


@pytest.fixture(scope="module")
def dense():
  images = jnp.ones((2, 6, 6, 4))
  return _random(jax.eval_shape(Net().init, jax.random.key(0), images))


@pytest.fixture(scope="module")
def compressed(dense):
  plan = plans.make_plan(RULES, dense)
  flat = trees.flatten(dense)
  nodes = {
    path: quantized(flat[path].shape, layer.num_codes, layer.spec)
    for path, layer in plan.items()
  }
  return trees.replace(dense, nodes), plan


def digest(variables):
  """The sha256 of paths, types and bytes, independent of the library."""
  total = hashlib.sha256()
  for path, leaf in sorted(trees.flatten(variables).items()):
    array = np.asarray(leaf)
    total.update(f"{path} {array.dtype} {array.shape}".encode())
    total.update(array.tobytes())
  return total.hexdigest()


# ---- what comes back --------------------------------------------------------


def test_loaded_variables_give_the_same_logits(compressed, tmp_path):
  variables, _ = compressed
  pack.save(tmp_path / "m.safetensors", variables, norm_epsilon=EPSILON)
  loaded = pack.load(tmp_path / "m.safetensors")
  images = np.random.default_rng(2).normal(size=(3, 6, 6, 4))
  apply = jax.jit(Net().apply)
  expected = apply(variables, images.astype(np.float32))
  got = apply(loaded, images.astype(np.float32))
  np.testing.assert_allclose(got, expected, rtol=1e-5)
  assert jax.tree.structure(loaded) == jax.tree.structure(variables)


def test_size_is_the_predicted_one_to_the_byte(compressed, dense):
  variables, plan = compressed
  packed = pack.pack_model(variables, norm_epsilon=EPSILON, architecture={})
  size = plans.predict_size(plan, variables)
  assert packed.payload_bytes == size.payload_bytes
  packed = pack.pack_model(dense, norm_epsilon=None, architecture={})
  assert packed.payload_bytes == plans.predict_size({}, dense).payload_bytes


def test_packing_what_was_loaded_changes_no_bit(compressed, tmp_path):
  variables, _ = compressed
  pack.save(tmp_path / "a", variables, norm_epsilon=EPSILON)
  pack.save(tmp_path / "b", pack.load(tmp_path / "a"), norm_epsilon=EPSILON)
  assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_dense_network_comes_back_with_its_statistics(dense, tmp_path):
  pack.save(tmp_path / "m", dense)
  test_structure.assert_same(
    pack.load(tmp_path / "m"), jax.tree.map(np.asarray, dense)
  )


TYPES = [np.dtype(t) for t in ("?", "i1", "u2", "i8", "f2", "f4", "f8")]
arrays = st.builds(
  lambda dtype, shape: np.arange(np.prod(shape)).reshape(shape).astype(dtype),
  st.sampled_from([*TYPES, jnp.dtype(jnp.bfloat16)]),
  st.lists(st.integers(0, 3), max_size=3),
)


@hypothesis.given(test_structure.trees(arrays))
@hypothesis.settings(deadline=None, max_examples=50)
def test_any_tree_of_any_type_comes_back(tree):
  packed = pack.pack_model(tree, norm_epsilon=None, architecture={})
  again, _ = pack.from_bytes(pack.to_bytes(packed))
  test_structure.assert_same(pack.unpack_model(again), tree)


@pytest.mark.parametrize(
  ("shape", "spec"),
  [
    ((8, 8), blocks.BlockSpec(4, (1,), (0,))),
    ((8, 6, 3), blocks.BlockSpec(2, (1,), (0,))),
    ((8, 6, 3), blocks.BlockSpec(3, (-1,), (0,))),
    ((3, 3, 4, 5), blocks.BlockSpec(2)),
  ],
)
@pytest.mark.parametrize("num_codes", [2, 12, 300])
def test_kernels_come_back_whatever_their_layout(shape, spec, num_codes):
  kernel = quantized(shape, num_codes, spec)
  tree = {"haiku/~/layer": [kernel, {3: (kernel,)}]}
  packed = pack.pack_model(tree, norm_epsilon=None, architecture={})
  loaded = pack.unpack_model(packed)
  assert jax.tree.structure(loaded) == jax.tree.structure(tree)
  assert digest(loaded) == digest(tree)


@pytest.mark.parametrize(
  ("sizes", "axes"), [((3,), ()), ((3,), (1,)), ((2, 3), (0, 1)), ((1,), (2,))]
)
@pytest.mark.parametrize("codebook", ["float16", "int8"])
def test_stacked_layers_come_back(sizes, axes, codebook):
  spec = blocks.BlockSpec(2, stack_axes=axes)
  rng = np.random.default_rng(0)
  codebooks = rng.normal(size=(*sizes, 4, 2)).astype(np.float32)
  codes = rng.integers(0, 4, (*sizes, 6, 4)).astype(np.uint8)
  node = vq_array.stack_layers(codebooks, codes, (8, 6), spec)
  packed = pack.pack_model(
    {"k": node},
    norm_epsilon=None,
    architecture={},
    storage=storages.Storage(codebook=codebook),
  )
  loaded = pack.unpack_model(packed)["k"]
  assert loaded.shape == node.shape
  np.testing.assert_array_equal(loaded.codes, node.codes)
  np.testing.assert_allclose(loaded.decode(), node.decode(), atol=0.05)


@pytest.mark.parametrize("scale", [1e-30, 1e-7, 1e-6, 1.0, 1e6, 1e30])
def test_codebooks_of_any_scale_keep_eleven_bits(scale):
  rng = np.random.default_rng(0)
  codebook = rng.normal(size=(64, 9)) * scale
  kernel = quantized((3, 3, 4, 5), 64, blocks.BlockSpec(1))
  kernel = kernel.replace(codebook=codebook.astype(np.float32))
  packed = pack.pack_model({"k": kernel}, norm_epsilon=None, architecture={})
  loaded = pack.unpack_model(packed)["k"].codebook
  np.testing.assert_allclose(loaded, kernel.codebook, rtol=2**-11)


@pytest.mark.parametrize(
  ("dtype", "scale"),
  [
    (np.float16, 1.0),
    (jnp.bfloat16, 1.0),
    (np.float64, 2.0**-1000),
    (np.float64, 2.0**1000),
  ],
)
def test_codebooks_keep_their_type(dtype, scale):
  kernel = quantized((4, 6), 6, blocks.BlockSpec(2), dtype, scale)
  packed = pack.pack_model({"k": kernel}, norm_epsilon=None, architecture={})
  loaded = pack.unpack_model(packed)
  assert digest(loaded) == digest({"k": kernel})


@pytest.mark.parametrize("largest", [0.0, 1.0, 65504, 65519.9, 65520.0, 3e38])
def test_the_largest_entry_never_overflows(largest):
  kernel = quantized((4, 6), 4, blocks.BlockSpec(2))
  kernel = kernel.replace(codebook=np.full((4, 2), largest, np.float32))
  packed = pack.pack_model({"k": kernel}, norm_epsilon=None, architecture={})
  loaded = pack.unpack_model(packed)["k"].codebook
  np.testing.assert_allclose(loaded, kernel.codebook, rtol=2**-11)


# ---- norms ------------------------------------------------------------------


class TwoNorms(nn.Module):
  @nn.compact
  def __call__(self, x):
    for name, epsilon in (("first", 1e-3), ("second", 0.3)):
      x = nn.Dense(8, name=f"fc_{name}")(x)
      x = nn.BatchNorm(True, epsilon=epsilon, name=name)(x)
    return x


@pytest.fixture(scope="module")
def two_norms():
  x = jnp.ones((2, 8))
  variables = jax.eval_shape(TwoNorms().init, jax.random.key(0), x)
  kernel = quantized((8, 8), 4, blocks.BlockSpec(2))
  small = jax.tree.map(lambda leaf: 1e-3 * leaf, _random(variables))
  return trees.replace(small, {"params/fc_first/kernel": kernel})


def test_each_norm_has_its_epsilon(two_norms, tmp_path):
  epsilons = {"fi.*": 1e-3, ".*": 0.3}
  packed = pack.save(tmp_path / "m", two_norms, norm_epsilon=epsilons)
  assert packed.header["norm_epsilon"] == {"first": 1e-3, "second": 0.3}
  x = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
  np.testing.assert_allclose(
    TwoNorms().apply(pack.load(tmp_path / "m"), x),
    TwoNorms().apply(two_norms, x),
    rtol=1e-5,
    atol=1e-7,
  )


@pytest.mark.parametrize(
  ("epsilon", "message"),
  [
    (None, r"first, second \(2 of 2\) cannot be folded without their epsilon"),
    ({"first": 1e-3}, r"norms second \(1 of 2\) cannot be folded"),
    ({"f": 1e-3, ".*": 1e-3}, r"match no norm.*\['f'\].*first, second"),
    ({".*": 1e-3, "first": 1e-3}, r"match no norm.*\['first'\]"),
    ({"(": 1e-3}, "is not a regular expression"),
    (-1e-3, "norm_epsilon.* is -0.001"),
    (float("nan"), "norm_epsilon.* is nan"),
    (9.001, "norm_epsilon.* is 9.001"),
    ("1e-5", "norm_epsilon.* is '1e-5'"),
    (True, "norm_epsilon.* is True"),
  ],
)
def test_folding_without_the_right_epsilons_is_refused(
  two_norms, epsilon, message
):
  with pytest.raises(errors.InputError, match=message):
    pack.pack_model(two_norms, norm_epsilon=epsilon, architecture={})


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_norms_of_any_shape_and_place_are_folded(shape):
  rng = np.random.default_rng(0)
  values = rng.uniform(0.5, 1, (4, *shape)).astype(np.float32)
  scale, bias, mean, var = map(np.array, values)
  tree = {
    "params": {"blocks": [{}, {7: {"scale": scale, "bias": bias}}]},
    "batch_stats": {"blocks": [None, {7: {"mean": mean, "var": var}}]},
    "kernel": KERNEL,
  }
  packed = pack.pack_model(tree, norm_epsilon=0.25, architecture={})
  assert "blocks/1/7~norm" in packed.buffers
  loaded = pack.unpack_model(packed)
  assert jax.tree.structure(loaded) == jax.tree.structure(tree)
  affine = loaded["params"]["blocks"][1][7]
  stats = loaded["batch_stats"]["blocks"][1][7]
  assert all(np.shape(x) == shape for x in (*affine.values(), *stats.values()))
  x = 0.7
  np.testing.assert_allclose(
    (x - stats["mean"]) / np.sqrt(stats["var"] + 0.25) * affine["scale"]
    + affine["bias"],
    (x - mean) / np.sqrt(var + 0.25) * scale + bias,
    rtol=1e-6,
  )


def test_what_is_no_whole_norm_stays_as_it_is():
  tree = {
    "params": {
      "bn": {"scale": np.ones((1, 3), "f4"), "bias": np.ones(3, "f4")}
    },
    "batch_stats": {"bn": {"mean": np.ones(3, "f4"), "var": np.ones(3, "f4")}},
    "kernel": KERNEL,
  }
  packed = pack.pack_model(tree, norm_epsilon=None, architecture={})
  assert digest(pack.unpack_model(packed)["params"]) == digest(tree["params"])


def test_epsilons_may_be_of_numpy(two_norms):
  packed = pack.pack_model(
    two_norms, norm_epsilon=np.float32(0.25), architecture={}
  )
  assert packed.header["norm_epsilon"] == 0.25


def test_a_negative_variance_is_named(two_norms):
  bad = trees.replace(
    two_norms, {"batch_stats/first/var": jnp.full((8,), -1.0)}
  )
  with pytest.raises(errors.InputError, match="first has a variance of -1"):
    pack.pack_model(bad, norm_epsilon=1e-3, architecture={})


def test_norms_of_other_types_keep_their_statistics(two_norms):
  half = jax.tree.map(
    lambda leaf: leaf if leaf.dtype == np.uint8 else leaf.astype(jnp.bfloat16),
    two_norms,
  )
  packed = pack.pack_model(half, norm_epsilon=None, architecture={})
  loaded = pack.unpack_model(packed)
  assert digest(loaded["batch_stats"]) == digest(half["batch_stats"])


def test_the_home_folder_is_the_same_for_writing_and_reading(
  tmp_path, monkeypatch
):
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  monkeypatch.chdir(tmp_path)
  pack.save("~/net.safetensors", {"a": np.ones(2)})
  assert (tmp_path / "home" / "net.safetensors").exists()
  np.testing.assert_array_equal(pack.load("~/net.safetensors")["a"], [1, 1])


# ---- what a file cannot hold ------------------------------------------------


@pytest.mark.parametrize(
  ("tree", "message"),
  [
    ({"key": jax.random.key(0)}, r"key is a random key.*key_data\(key\)"),
    ({"a": [np.ones(2, np.complex64)]}, "a/0 is of type complex64"),
    ({"a": jnp.ones(2, jnp.float8_e4m3fn)}, "a is of type float8_e4m3fn"),
    ({"a": np.array(["x"])}, "a is of type <U1"),
    ({"a": np.array([None])}, "a is of type object"),
    ({"a": np.array([1, np.nan])}, "a has values up to nan"),
    ({"a": np.array([1, -np.inf], np.float16)}, "a has values up to inf"),
    ({"k": KERNEL.replace(codebook=np.ones((3, 4, 2)))}, "k of shape.* codes"),
    ({"k": KERNEL.replace(codebook=np.ones(4))}, r"k has a codebook.*\[K, D\]"),
    (
      {"k": jax.eval_shape(lambda: KERNEL)},
      "k, leaf 'codebook', is of type Sh",
    ),
    ({"k": KERNEL.replace(codebook=np.ones((1, 2)))}, "k/num_codes is 1 "),
    ({"k": KERNEL.replace(codebook=np.ones((4, 2), int))}, "k/dtype is 'int"),
    ({"k": KERNEL.replace(codebook=np.full((4, 2), np.nan))}, "k has 8 NaN"),
    (
      {"k": KERNEL.replace(codes=KERNEL.codes + 4)},
      "k has codes of uint8 from",
    ),
    (
      {"k": KERNEL.replace(codes=KERNEL.codes[:1])},
      "k of shape .* and codes of shape",
    ),
    ({"k": KERNEL.replace(kernel_shape=(0, 6))}, "k/shape is"),
    (
      {"k": KERNEL.replace(spec=blocks.BlockSpec(2, (1,), (1,)))},
      "k/out_axis is 1",
    ),
    ({"k": KERNEL.replace(spec=blocks.BlockSpec(3))}, "k/channels is 3"),
    ({"k": KERNEL.replace(spec=blocks.BlockSpec(2.0))}, "k/channels is 2.0"),
    ({"k": KERNEL.replace(kernel_shape=(8.5, 6))}, r"k/shape is \[8.5, 6\]"),
  ],
)
def test_what_a_file_cannot_hold_is_named(tree, message):
  with pytest.raises(errors.InputError, match=message):
    pack.pack_model(tree, norm_epsilon=None, architecture={})


@pytest.mark.parametrize(
  ("value", "message"),
  [
    ({"a": {1, 2}}, "not JSON"),
    ({"a": float("nan")}, "not JSON"),
    (["resnet"], r"\['resnet'\] where a dict"),
    ("resnet", "'resnet' where a dict"),
  ],
)
def test_an_architecture_is_a_json_object(value, message):
  with pytest.raises(errors.InputError, match=f"architecture is {message}"):
    pack.pack_model({}, norm_epsilon=None, architecture=value)


def test_architecture_is_kept(compressed, tmp_path):
  variables, _ = compressed
  architecture = {"name": "net", "depth": 3}
  pack.save(
    tmp_path / "m",
    variables,
    norm_epsilon=EPSILON,
    architecture=architecture,
  )
  assert pack.read_header(tmp_path / "m")["architecture"] == architecture


# ---- bad files --------------------------------------------------------------


def test_bad_files_are_named(compressed, tmp_path):
  variables, _ = compressed
  path = tmp_path / "m.safetensors"
  with pytest.raises(errors.InputError, match="no weights file.*m.safetensors"):
    pack.load(path)
  pack.save(path, variables, norm_epsilon=EPSILON)
  data = path.read_bytes()
  path.write_bytes(data[:-10])
  with pytest.raises(errors.InputError, match="m.safetensors.*truncated"):
    pack.load(path)
  path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
  with pytest.raises(errors.InputError, match="m.safetensors.*damaged"):
    pack.load(path)
  safetensors.numpy.save_file({"x": np.ones(3)}, path)
  assert pack.read_header(path) is None
  with pytest.raises(errors.InputError, match="pqf_jax did not pack"):
    pack.load(path)


def test_what_is_no_regular_file_is_refused(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  for path in (tmp_path / "pipe", "/dev/zero"):
    for read in (pack.load, pack.read_header):
      with pytest.raises(errors.InputError, match="not a regular file"):
        read(path)


@pytest.fixture(scope="module")
def file(compressed):
  variables, _ = compressed
  return pack.pack_model(
    variables, norm_epsilon=EPSILON, architecture={"name": "net"}
  )


def rewrite(text, buffers):
  """The bytes of a file with any text as its header."""
  return container.write(buffers, {pack.METADATA_KEY: text})


@pytest.mark.parametrize(
  ("before", "after"),
  [
    ('"norm_epsilon":0.1', '"norm_epsilon":0.2'),
    ('"num_codes":4', '"num_codes":3'),
    ("[3,3,4,8]", "[3,3,8,4]"),
    ('"name":"net"', '"name":"ten"'),
    ('"exponent":-14', '"exponent":-13'),
    ('"format":3', '"format": 3'),
    ('"format":3', '"format":3,"format":3'),
    ('"in_axis":-2', '"in_axis":0'),
    ("params/conv", "params/conw"),
    ('"nodes":{}', '"nodes":{"x":"none"}'),
  ],
)
def test_every_change_of_the_header_is_damage(file, before, after):
  text = header.canonical(file.header)
  assert before in text
  pack.from_bytes(rewrite(text, file.buffers))
  with pytest.raises(errors.InputError, match="damaged: (its content|a name)"):
    pack.from_bytes(rewrite(text.replace(before, after), file.buffers))


def test_the_order_of_layers_is_damage(file):
  turned = {"layers": dict(reversed(file.header["layers"].items()))}
  text = json.dumps(file.header | turned, separators=(",", ":"))
  with pytest.raises(errors.InputError, match="damaged: its content does not"):
    pack.from_bytes(rewrite(text, file.buffers))


def seal(fields, buffers):
  """The bytes of a file with a right digest, whatever its header says."""
  fields = fields | {"sha256": header.digest(fields, buffers)}
  return rewrite(header.canonical(fields), buffers)


CONV, FC = "params/conv/kernel", "params/fc/kernel"
WRONG_LAYERS = [
  ({"shape": [3, 3, 4, 800]}, "buffer '~codes' is uint8"),
  ({"shape": [3, 3, 4, 1]}, "buffer '~codes' is uint8"),
  ({"shape": [3, 3, 4, -8]}, "conv/kernel/shape is"),
  ({"shape": [3, 3, 4, 8.0]}, "conv/kernel/shape is"),
  ({"shape": [32]}, "conv/kernel/shape is"),
  ({"shape": [1 << 70, 8]}, "conv/kernel/shape is"),
  ({"shape": [1 << 39] * 30}, "buffer '~codes' is uint8"),
  ({"shape": 5}, "conv/kernel/shape is 5"),
  ({"num_codes": 0}, "conv/kernel/num_codes is 0"),
  ({"num_codes": 1}, "conv/kernel/num_codes is 1 "),
  ({"num_codes": 1.5}, "conv/kernel/num_codes is 1.5"),
  ({"num_codes": "2"}, "conv/kernel/num_codes is '2'"),
  ({"num_codes": True}, "conv/kernel/num_codes is True"),
  ({"num_codes": 65537}, "conv/kernel/num_codes is 65537"),
  ({"num_codes": 16}, "buffer '~codes' is uint8"),
  ({"channels": True}, "conv/kernel/channels is True"),
  ({"channels": 0}, "conv/kernel/channels is 0"),
  ({"channels": 3}, "conv/kernel/channels is 3"),
  ({"channels": None}, "conv/kernel/channels is None"),
]
WRONG_LAYERS_3 = [
  ({"codebook": "int4"}, "conv/kernel/codebook is 'int4' where float16 or in"),
  ({"codebook": "int8"}, r"'~codebooks' is float16 \(80,\), but .* \(8,\)"),
  ({"coding": "ans"}, "conv/kernel/coding is 'ans' where fixed"),
  ({"dtype": "float8"}, "conv/kernel/dtype is 'float8'"),
  ({"dtype": ["float32"]}, "conv/kernel/dtype is "),
  ({"in_axis": 4}, "conv/kernel/in_axis is 4"),
  ({"in_axis": 3}, "conv/kernel/out_axis is -1 where other axes"),
  ({"out_axis": "1"}, "conv/kernel/out_axis is '1'"),
  ({"stack": [0, 2]}, "buffer '~codes' is uint8"),
  ({"stack": [3, 2]}, "conv/kernel/stack is"),
  ({"stack": [0]}, "conv/kernel/stack is"),
  ({"stack": [0, 0]}, "conv/kernel/stack is"),
  ({"stack": [1, 0.5]}, "conv/kernel/stack is"),
  ({"stack": "2"}, "conv/kernel/stack is"),
  ({"exponent": 0.5}, "conv/kernel/exponent is 0.5"),
  ({"exponent": 2000}, "conv/kernel/exponent is 2000"),
  ({"exponent": 120}, "codebook of params/conv/kernel is not finite in float3"),
  ({"residual": 2}, "conv/kernel has a field 'residual', which is not known"),
]


def spread(fields):
  """A header whose layers have all their fields themselves."""
  layers = {
    path: fields["common"] | layer for path, layer in fields["layers"].items()
  }
  return fields | {"common": {}, "layers": layers}


@pytest.mark.parametrize(
  ("fields", "message"), [*WRONG_LAYERS, *WRONG_LAYERS_3]
)
def test_fields_that_cannot_be_are_named(file, fields, message):
  changed = spread(file.header)
  changed["layers"][CONV] |= fields
  with pytest.raises(errors.InputError, match=message):
    pack.from_bytes(seal(changed, file.buffers))


def format_2():
  """The content of a file that the first version wrote."""
  return pack.read(GOLDENS / "packed_format2.safetensors")


@pytest.mark.parametrize(("fields", "message"), WRONG_LAYERS)
def test_fields_of_format_2_are_checked_as_well(fields, message):
  old = format_2()
  layer = dict(shape=[3, 3, 16, 32], channels=2, num_codes=32)
  if "channels" in fields and fields["channels"] == 3:
    message = message.replace("channels is 3", "channels is 3 where a divisor")
  changed = list((layer | fields).values())
  layers = old.header["layers"] | {"params/conv1/kernel": changed}
  with pytest.raises(
    errors.InputError, match=message.replace("conv/", "conv1/")
  ):
    pack.from_bytes(seal(old.header | {"layers": layers}, old.buffers))


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"format": 4}, "format is 4, but this version of pqf_jax reads 2 and 3"),
    ({"format": True}, "format is True"),
    ({"format": [[[[[[[[1]]]]]]]]}, "format is "),
    ({"layers": 5}, "layers is 5"),
    ({"layers": {"x": 5}}, "layers/x is 5"),
    ({"layers": {}}, "buffer '~codes' is uint8|common is .* without a layer"),
    ({"norm_epsilon": None}, "norm_epsilon is None"),
    ({"norm_epsilon": "0.1"}, "norm_epsilon is '0.1'"),
    ({"norm_epsilon": 9.001}, "norm_epsilon is 9.001"),
    ({"norm_epsilon": True}, "norm_epsilon is True"),
    ({"architecture": 1}, "architecture is 1"),
    ({"more": 1}, "has a field 'more', which is not known"),
  ],
)
def test_wrong_fields_of_the_header_are_named(file, version, fields, message):
  content = file if version == 3 else format_2()
  changed = content.header | fields
  with pytest.raises(errors.InputError, match=message):
    pack.from_bytes(seal(changed, content.buffers))


@pytest.mark.parametrize("version", [2, 3])
def test_missing_fields_of_the_header_are_named(file, version):
  content = file if version == 3 else format_2()
  for name in content.header:
    fields = {key: content.header[key] for key in content.header if key != name}
    sealed = fields | {
      "sha256": header.digest({"format": version} | fields, content.buffers)
    }
    text = header.canonical(fields if name == "sha256" else sealed)
    with pytest.raises(errors.InputError, match=f"no field '{name}'|{name} is"):
      pack.from_bytes(rewrite(text, content.buffers))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"norm_epsilon": {}}, "norm_epsilon has no field 'bn'"),
    ({"norm_epsilon": {"bn": 0.1, "x": 0.1}}, "norm_epsilon has a field 'x'"),
    ({"norm_epsilon": {"bn": "0.1"}}, "norm_epsilon/bn is '0.1'"),
    ({"nodes": {"params": "list"}}, "nodes/params is 'list'"),
    ({"nodes": {"params": "set"}}, "nodes/params is 'set'"),
    ({"nodes": {"params": []}}, r"nodes/params is \[\]"),
    ({"nodes": {"params/fc/kernel/x": "none"}}, "of two variables"),
    ({"common": {"coding": "fixed", "x": 1}}, "has no field|has a field 'x'"),
    ({"common": 3}, "common is 3"),
  ],
)
def test_wrong_fields_of_format_3_are_named(file, fields, message):
  with pytest.raises(errors.InputError, match=message):
    pack.from_bytes(seal(file.header | fields, file.buffers))


def test_errors_take_one_short_line(tmp_path):
  packed = pack.pack_model({"a": KERNEL}, norm_epsilon=None, architecture={})
  layers = {"b\n" + "c" * 10_000: {"residual": 1}}
  data = seal(packed.header | {"layers": layers}, packed.buffers)
  (tmp_path / "m").write_bytes(data)
  with pytest.raises(errors.InputError, match="m is not a packed") as caught:
    pack.load(tmp_path / "m")
  assert "\n" not in str(caught.value)
  assert len(str(caught.value)) < 1000


def test_fields_in_common_come_once(file):
  changed = spread(file.header) | {"common": {"coding": "fixed"}}
  with pytest.raises(errors.InputError, match="no field that is in common"):
    pack.from_bytes(seal(changed, file.buffers))


FULL = np.full
CODES = np.zeros(17, np.uint8)


@pytest.mark.parametrize(
  ("buffers", "message"),
  [
    (
      {"~codes": CODES[1:]},
      r"'~codes' is uint8 \(16,\), but the 2 layers need",
    ),
    ({"~codes": np.append(CODES, CODES)}, r"'~codes' is uint8 \(34,\)"),
    ({"~codes": CODES.astype(np.int8)}, "'~codes' is int8"),
    ({"~codes": CODES.reshape(1, 17)}, "'~codes' is uint8"),
    ({"~codebooks": FULL(3, np.float16(1))}, r"'~codebooks' is float16 \(3,"),
    ({"~codebooks": FULL(80, np.float16(np.nan))}, "conv.* is not finite"),
    ({"~codebooks": FULL(80, np.float16(np.inf))}, "conv.* is not finite"),
    ({"bn~norm": np.ones((2, 8))}, "'bn~norm' is float64"),
    ({"bn~norm": np.ones((3, 8), np.float32)}, "'bn~norm' is float32"),
    ({"bn~norm": np.array(np.float32(1))}, "'bn~norm' is float32"),
    ({"bn~norm": FULL((2, 8), np.float32(np.nan))}, "bn has values up to nan"),
    ({"params/fc/bias": FULL(8, np.float32(np.inf))}, "bias has values up to"),
    ({"params/bn/scale": np.ones(8)}, "list of variables is .*each path once"),
    ({CONV: np.ones(8)}, "list of variables is .*each path once"),
    ({"params": np.ones(8)}, "within another|two variables"),
    ({"x~y": np.ones(8)}, "'x~y' is not a path"),
    ({"~extra": np.ones(8)}, "'~extra' is not a path"),
  ],
)
def test_wrong_buffers_are_named(file, buffers, message):
  assert CODES.size == file.buffers["~codes"].size
  assert file.buffers["~codebooks"].size == 80
  with pytest.raises(errors.InputError, match=message):
    pack.from_bytes(seal(file.header, file.buffers | buffers))


def test_a_code_without_a_codeword_is_refused():
  kernel = quantized((4, 6), 12, blocks.BlockSpec(2))
  packed = pack.pack_model({"k": kernel}, norm_epsilon=None, architecture={})
  codes = FULL(6, np.uint8(0xC0))
  with pytest.raises(errors.InputError, match="code of k is 12 where .* below"):
    pack.from_bytes(seal(packed.header, packed.buffers | {"~codes": codes}))


def test_bits_after_the_last_code_are_refused():
  kernel = quantized((4, 5), 8, blocks.BlockSpec(4))
  packed = pack.pack_model({"k": kernel}, norm_epsilon=None, architecture={})
  assert packed.buffers["~codes"].size == 2  # 15 bits
  codes = packed.buffers["~codes"] | np.array([0, 128], np.uint8)
  with pytest.raises(errors.InputError, match="codes of k have bits after the"):
    pack.from_bytes(seal(packed.header, packed.buffers | {"~codes": codes}))


@pytest.mark.parametrize(
  "text",
  [
    "[" * 100_000,
    '{"a":' * 100_000,
    '{"format":' + "[" * 900 + "]" * 900 + "}",
    '{"architecture":' + "[" * 900 + "]" * 900 + ',"format":3,"sha256":""}',
    "",
    "null",
    "[]",
    '{"format":3,"sha256":NaN}',
    '{"format":3,"sha256":"","x":1e999}',
    '{"format":' + "9" * 5000 + "}",
    '{"format":3,"sha256":"\\ud800"}',
  ],
)
def test_headers_that_are_no_headers_are_refused(text):
  with pytest.raises(errors.InputError):
    pack.from_bytes(rewrite(text, {}))


# ---- memory -----------------------------------------------------------------


@pytest.mark.parametrize(
  ("num_codes", "dtype"), [(256, np.uint8), (1024, np.uint16)]
)
def test_save_and_load_take_twice_the_file_besides_the_result(
  tmp_path, num_codes, dtype
):
  spec = blocks.BlockSpec(4)
  codes = np.random.default_rng(0).integers(0, num_codes, (2048, 512))
  codebook = np.ones((num_codes, 4), np.float32)
  kernel = vq_array.VQArray(codebook, codes.astype(dtype), (2048, 2048), spec)
  tree = {"kernel": kernel, "bias": np.ones(1 << 17, np.float32)}
  path = tmp_path / "m"
  pack.save(path, {"bias": np.ones(2)})  # whatever is loaded once
  tracemalloc.start()
  try:
    packed = pack.save(path, tree)
    saving = tracemalloc.get_traced_memory()[1]
    del packed
    tracemalloc.reset_peak()
    loaded = pack.load(path)
    loading = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert digest(loaded) == digest(tree)
  result = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
  size = path.stat().st_size
  assert saving <= 2 * size + result
  assert loading <= 2 * size + result


@pytest.mark.parametrize("num_codes", [200, 256, 300, 1 << 16])
def test_what_was_loaded_does_not_change_with_the_file(tmp_path, num_codes):
  spec = blocks.BlockSpec(2)
  kernel = quantized((4 << 16, 2), num_codes, spec)
  tree = {"kernel": kernel, "bias": np.arange(5.0)}
  path = tmp_path / "m"
  pack.save(path, tree)
  loaded = pack.load(path)
  before = digest(loaded)
  with open(path, "r+b") as stream:  # in place
    stream.write(b"\0" * path.stat().st_size)
  assert digest(loaded) == before


def test_a_small_file_cannot_ask_for_much(tmp_path):
  kernel = quantized((4, 6), 4, blocks.BlockSpec(2))
  packed = pack.pack_model({"k": kernel}, norm_epsilon=None, architecture={})
  common = packed.header["common"]
  assert packed.header["layers"] == {"k": {}}
  tracemalloc.start()
  try:
    for fields in (
      {"shape": [1 << 20, 1 << 6]},
      {"shape": [1 << 20, 1 << 6], "num_codes": 1},
      {"shape": [1 << 20, 1 << 6], "num_codes": 2},
    ):
      with pytest.raises(errors.InputError):
        pack.from_bytes(
          seal(packed.header | {"common": common | fields}, packed.buffers)
        )
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
  finally:
    tracemalloc.stop()


# ---- formats, for ever ------------------------------------------------------


@pytest.mark.parametrize(
  ("version", "expected"),
  [
    (2, "a12f46c6ebfb49f61a671794646b93089302ccb088a2e20358f7b6f35a242390"),
    (3, "7ae072613b145f8a07c5e1b81fa25b603f39fea0cbb8c0099aed15490de0ca6d"),
  ],
)
def test_files_of_every_format_load_as_when_they_were_written(
  version, expected
):
  # Tiny of tests/pipeline with a dense kernel, K of 32 and 12; format 2 and its
  # digest come from the code of that time.
  file = GOLDENS / f"packed_format{version}.safetensors"
  assert digest(pack.load(file)) == expected


def test_files_of_format_3_are_written_as_ever(tmp_path):
  file = GOLDENS / "packed_format3.safetensors"
  architecture = pack.read_header(file)["architecture"]
  variables = pack.load(file)
  pack.save(
    tmp_path / "m", variables, norm_epsilon=1e-3, architecture=architecture
  )
  assert (tmp_path / "m").read_bytes() == file.read_bytes()


def test_names_of_format_2_part_at_every_slash():
  buffers = {"a/~1/b": np.ones(2), "a//x.norm": np.ones((2, 3), np.float32)}
  fields = {"architecture": {}, "format": 2, "layers": {}, "norm_epsilon": 0.5}
  _, contents = pack.from_bytes(seal(fields, buffers))
  assert contents.dense.keys() == {"a/~01/b"}
  fields["sha256"] = ""
  loaded = pack.unpack_model(pack.PackedModel(fields, buffers))
  assert loaded["a"]["~1"]["b"].tolist() == [1, 1]
  assert loaded["params"]["a"][""]["x"]["bias"].shape == (3,)
  assert loaded["batch_stats"]["a"][""]["x"]["var"].tolist() == [0.5] * 3


# ---- the file as a whole ----------------------------------------------------


def test_loading_imports_no_training_code(compressed, tmp_path):
  variables, _ = compressed
  pack.save(tmp_path / "m.safetensors", variables, norm_epsilon=EPSILON)
  code = (
    "import sys, pqf_jax\n"
    f"pqf_jax.load({os.fspath(tmp_path / 'm.safetensors')!r})\n"
    "bad = {'pqf_jax.finetune', 'pqf_jax.pipeline', 'pqf_jax.quantize',\n"
    "       'pqf_jax.data', 'orbax', 'tensorflow_datasets', 'grain',\n"
    "       'ml_collections', 'sklearn'} & sys.modules.keys()\n"
    "assert not bad, bad\n"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
  "recipe", ["resnet18", "mobilenet_v2", "efficientnet_lite0"]
)
def test_a_file_is_hardly_larger_than_its_payload(recipe, tmp_path):
  config = importlib.import_module(f"configs.{recipe}").get_config(
    "imagenet2012,large"
  )
  network, template = job.build_network(config)
  plan = planning.make_plan(config, network, template)
  variables = jax.tree.map(
    lambda leaf: np.zeros(leaf.shape, leaf.dtype),
    plans.compressed_shapes(plan, template),
  )
  path = tmp_path / "m.safetensors"
  packed = pack.save(
    path, variables, norm_epsilon=1e-5, architecture=dict(config.model)
  )
  assert (
    packed.payload_bytes == plans.predict_size(plan, template).payload_bytes
  )
  assert path.stat().st_size <= 1.015 * packed.payload_bytes

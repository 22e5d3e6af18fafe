"""The types of a packed file: sizes, what comes back, what is refused."""

import itertools
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pqf_jax import errors, pack
from pqf_jax.core import blocks, trees, vq_array
from pqf_jax.core import plan as plans
from pqf_jax.core.storage import CHOICES, Storage
from pqf_jax.packing import header

STORAGES = [Storage(*types) for types in itertools.product(*CHOICES.values())]
SMALLEST = Storage("int8", "float16")


def kernel(shape, num_codes, channels, dtype=np.float32, scale=1.0):
  """A kernel with random codes and a random codebook."""
  rng = np.random.default_rng(num_codes)
  spec = blocks.BlockSpec(channels)
  c_out, m, length = spec.layout(shape)
  return vq_array.VQArray(
    (scale * rng.normal(size=(num_codes, length))).astype(dtype),
    rng.integers(0, num_codes, (c_out, m)).astype(
      vq_array.code_dtype(num_codes)
    ),
    shape,
    spec,
  )


def vector(seed, size=6, dtype=np.float32):
  rng = np.random.default_rng(seed)
  return np.asarray(rng.uniform(0.5, 1.5, size), dtype)


@pytest.fixture(scope="module")
def network():
  """One variable of each kind that a storage treats in its own way."""
  params = {
    "conv": {"kernel": kernel((3, 3, 8, 12), 16, 2)},
    "fc": {"kernel": kernel((8, 10), 8, 4, scale=1e-3), "bias": vector(0)},
    "stem": {"kernel": 1e-5 * np.outer(vector(1), vector(2))},
    "bn": {"scale": vector(3), "bias": vector(4)},
    "bare": {"scale": vector(5)},
    "wide": vector(6, dtype=np.float64),
    "half": vector(7, dtype=jnp.bfloat16),
    "none": np.zeros(0, np.float32),
    "one": np.float32(0.1),
    "~odd/key": vector(8),
  }
  params["stem"]["kernel"] = params["stem"]["kernel"].astype(np.float32)
  stats = {"mean": vector(9), "var": vector(10)}
  return {
    "params": params,
    "batch_stats": {"bn": stats, "bare": stats},
    "nnx/fc/kernel": np.outer(vector(11), vector(12)).astype(np.float32),
    "table": vector(13),
    "count": np.arange(3),
  }


def assert_same(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  for new, old in zip(
    jax.tree.leaves(left), jax.tree.leaves(right), strict=True
  ):
    assert (new.dtype, new.tobytes()) == (old.dtype, old.tobytes())


def save(tree, storage, epsilon=1e-3):
  packed = pack.pack_model(
    tree, norm_epsilon=epsilon, architecture={}, storage=storage
  )
  data = pack.to_bytes(packed)
  return packed, data, pack.unpack_model(pack.from_bytes(data)[0])


@pytest.mark.parametrize("storage", STORAGES)
def test_size_is_the_predicted_one_to_the_byte(network, storage):
  flat = trees.flatten(network, vq_array.is_vq)
  plan = {
    path: plans.LayerPlan(leaf.spec, len(leaf.codebook), 1)
    for path, leaf in flat.items()
    if vq_array.is_vq(leaf)
  }
  packed, _, _ = save(network, storage)
  size = plans.predict_size(plan, network, storage)
  assert packed.payload_bytes == size.payload_bytes
  dense = vq_array.decode_params(network)
  packed, _, _ = save(dense, storage)
  assert packed.payload_bytes == (
    plans.predict_size({}, dense, storage).payload_bytes
  )


@pytest.mark.parametrize("storage", STORAGES)
def test_types_come_back_and_nothing_changes_twice(network, storage):
  _, data, loaded = save(network, storage)
  assert jax.tree.structure(loaded) == jax.tree.structure(network)
  for new, old in zip(
    jax.tree.leaves(loaded), jax.tree.leaves(network), strict=True
  ):
    assert (new.dtype, new.shape) == (old.dtype, old.shape)
  assert save(loaded, storage)[1] == data
  # What is rounded once fits into the larger types.
  assert_same(save(loaded, Storage())[2], loaded)


def test_only_weights_are_rounded(network):
  loaded = trees.flatten(save(network, SMALLEST)[2], vq_array.is_vq)
  flat = trees.flatten(network, vq_array.is_vq)
  changed = {
    path
    for path, leaf in flat.items()
    if not vq_array.is_vq(leaf) and not np.array_equal(loaded[path], leaf)
  }
  # The statistics of what is folded are those of no data.
  rounded = {"fc/bias", "stem/kernel", "bn/scale", "bn/bias", "bare/scale"}
  rounded |= {"one", "~odd/key"}
  assert changed == {f"params/{path}" for path in rounded} | {
    *("batch_stats/bn/mean", "batch_stats/bn/var", "nnx/fc/kernel")
  }
  for path in changed - {path for path in changed if "/bn/" in path}:
    np.testing.assert_allclose(loaded[path], flat[path], rtol=2**-11)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_folded_norms_are_rounded_alike(shape):
  tree = {
    "params": {"bn": {"scale": vector(0, shape), "bias": vector(1, shape)}},
    "batch_stats": {"bn": {"mean": vector(2, shape), "var": vector(3, shape)}},
    "kernel": kernel((4, 6), 4, 2),
  }
  exact = save(tree, Storage())[2]["params"]["bn"]
  rounded = save(tree, SMALLEST)[2]["params"]["bn"]
  for name in ("scale", "bias"):
    assert rounded[name].shape == shape
    np.testing.assert_allclose(rounded[name], exact[name], rtol=2**-11)
    assert (rounded[name] != exact[name]).any()


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6, 1e30])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16])
def test_int8_codebooks_of_any_scale_keep_seven_bits(scale, dtype):
  node = kernel((4, 6), 6, 2, dtype, scale)
  _, data, loaded = save({"k": node}, Storage("int8"))
  largest = np.abs(node.codebook.astype(np.float64)).max()
  np.testing.assert_allclose(
    loaded["k"].codebook.astype(np.float64),
    node.codebook.astype(np.float64),
    atol=largest / 127,
  )
  assert loaded["k"].codebook.dtype == dtype
  assert save(loaded, Storage("int8"))[1] == data


@pytest.mark.parametrize("scale", [1e-38, 1e-6, 1e6, 1e38])
def test_weights_of_any_scale_keep_eleven_bits(scale):
  tree = {"params": {"a": (scale * vector(0)).astype(np.float32)}}
  packed, _, loaded = save(tree, SMALLEST)
  assert packed.header["exponents"].keys() == {"params/a~half"}
  np.testing.assert_allclose(
    loaded["params"]["a"], tree["params"]["a"], rtol=2**-11
  )


# ---- what would lose too much -----------------------------------------------


@pytest.mark.parametrize("used", [True, False])
def test_int8_refuses_to_lose_most_of_a_kernel(used):
  node = kernel((16, 16), 8, 2)
  far = node.codebook.copy()
  far[3, 1] = 1000
  codes = node.codes if used else node.codes % 3
  tree = {"k": node.replace(codebook=far, codes=codes)}
  save(tree, Storage())
  if used:  # it is nearly all there is of the kernel
    save(tree, Storage("int8"))
    return
  with pytest.raises(errors.InputError, match=r"k has.*\d%.*number is 1000"):
    save(tree, Storage("int8"))


def test_float16_refuses_norms_whose_means_are_far_from_zero():
  def tree(mean):
    return {
      "params": {"bn": {"scale": vector(0), "bias": vector(1)}},
      "batch_stats": {
        "bn": {"mean": np.full(6, mean, np.float32), "var": vector(2)}
      },
      "kernel": kernel((4, 6), 4, 2),
    }

  save(tree(5.0), SMALLEST)
  save(tree(3000.0), Storage("int8"))
  with pytest.raises(errors.InputError, match="bn has means up to 3000.*shift"):
    save(tree(3000.0), SMALLEST)


@pytest.mark.parametrize("storage", ["int8", None, {"codebook": "int8"}])
def test_what_is_no_storage_is_refused(storage):
  with pytest.raises(errors.InputError, match="storage is .*give pqf_jax.Stor"):
    pack.pack_model({}, norm_epsilon=None, architecture={}, storage=storage)
  with pytest.raises(errors.InputError, match="storage is .*give pqf_jax.Stor"):
    plans.predict_size({}, {}, storage)


# ---- bad files --------------------------------------------------------------


@pytest.fixture(scope="module")
def file(network):
  return save(network, SMALLEST)[0]


HALF, NORM, STEM = "params/fc/bias~half", "bn~norm", "params/stem/kernel~half"


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"exponents": 5}, "exponents is 5"),
    ({"exponents": {"table": 1}}, r"exponents is \['table'\]"),
    ({"exponents": {"~codebooks8": 1}}, r"exponents is \['~codebooks8'\]"),
    ({"exponents": {STEM: 0.5}}, "exponents/params/stem.* is 0.5"),
    ({"exponents": {STEM: True}}, "exponents/params/stem.* is True"),
    ({"exponents": {HALF: 128}}, "exponents/params/fc.* is 128.*overflows"),
    ({"exponents": {NORM: 1 << 70}}, "exponents/bn.* is 1180.*overflows"),
    ({"format": 2}, "unknown|not known|no field"),
  ],
)
def test_wrong_exponents_are_named(file, fields, message):
  with pytest.raises(errors.InputError, match=message):
    header.check(file.header | fields, file.buffers)


@pytest.mark.parametrize(
  ("buffers", "message"),
  [
    (
      {HALF: np.ones(6, np.float32)},
      "fc/bias~half' is 'float32' where float16",
    ),
    ({HALF: np.full(6, np.nan, np.float16)}, "fc/bias has values up to nan"),
    ({NORM: np.full((2, 6), np.inf, np.float16)}, "bn has values up to inf"),
    ({NORM: np.ones((2, 6), jnp.bfloat16)}, "bn~norm' is bfloat16"),
    ({NORM: np.ones((3, 6), np.float16)}, r"bn~norm' is .* \(3, 6\)"),
    ({"params/fc/bias": np.ones(6)}, "list of variables.*each path once"),
    ({"params/bn/bias~half": np.ones(6, np.float16)}, "each path once"),
    ({"a~half~half": np.ones(6, np.float16)}, "'a~half' is not a path"),
    ({"~codebooks": np.ones(1, np.float16)}, r"'~codebooks' is .* \(0,\)"),
    ({"~codebooks8": np.ones(1, np.int8)}, r"'~codebooks8' is int8 \(1,\)"),
    ({"~codebooks8": np.ones(544, np.uint8)}, "'~codebooks8' is uint8"),
  ],
)
def test_wrong_buffers_are_named(file, buffers, message):
  with pytest.raises(errors.InputError, match=message):
    header.check(file.header, file.buffers | buffers)


def test_an_exponent_under_which_int8_overflows_is_refused(file):
  layers = {
    path: fields | {"exponent": 122}
    for path, fields in file.header["layers"].items()
  }
  with pytest.raises(errors.InputError, match="kernel is not finite in float3"):
    header.check(file.header | {"layers": layers}, file.buffers)


def test_layers_of_both_types_are_read_from_one_file():
  nodes = {"a": kernel((4, 6), 4, 2), "b": kernel((4, 6), 5, 2)}
  apart = {
    path: save({path: node}, Storage(codebook))[0]
    for (path, node), codebook in zip(
      nodes.items(), ("int8", "float16"), strict=True
    )
  }
  layers = {
    path: packed.header["common"] | packed.header["layers"][path]
    for path, packed in apart.items()
  }
  fields = apart["a"].header | {"common": {}, "layers": layers}
  buffers = {
    "~codes": np.concatenate([x.buffers["~codes"] for x in apart.values()]),
    "~codebooks8": apart["a"].buffers["~codebooks8"],
    "~codebooks": apart["b"].buffers["~codebooks"],
  }
  loaded = pack.unpack_model(pack.PackedModel(fields, buffers))
  for path, packed in apart.items():
    assert_same(loaded[path], pack.unpack_model(packed)[path])


def test_a_file_of_small_types_takes_twice_its_bytes_besides_the_result(
  tmp_path,
):
  codes = np.random.default_rng(0).integers(0, 256, (1024, 512))
  codebook = np.random.default_rng(1).normal(size=(256, 4)).astype(np.float32)
  node = vq_array.VQArray(
    codebook, codes.astype(np.uint8), (2048, 1024), blocks.BlockSpec(4)
  )
  tree = {"params": {"kernel": node, "bias": np.ones(1 << 18, np.float32)}}
  path = tmp_path / "m"
  pack.save(path, {"params": np.ones(2, np.float32)}, storage=SMALLEST)
  tracemalloc.start()
  try:
    packed = pack.save(path, tree, storage=SMALLEST)
    saving = tracemalloc.get_traced_memory()[1]
    del packed
    tracemalloc.reset_peak()
    pack.load(path)
    loading = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  limit = 2 * path.stat().st_size + sum(x.nbytes for x in jax.tree.leaves(tree))
  assert saving <= limit
  assert loading <= limit

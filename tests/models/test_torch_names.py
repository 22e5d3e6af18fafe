import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from safetensors import numpy as safetensors_numpy

from pqf_jax import errors
from pqf_jax.core import blocks, trees, vq_array
from pqf_jax.models import torch_names

RNG = np.random.default_rng(0)


def normal(*shape, dtype=np.float32):
  return RNG.normal(size=shape).astype(dtype)


def template(**leaves):
  """Returns variables as shapes from {path with '__' for '/': shape}."""
  return trees.nest(
    {
      path.replace("__", "/"): jax.ShapeDtypeStruct(shape, jnp.float32)
      for path, shape in leaves.items()
    }
  )


STATE_DICT = {
  "conv.weight": normal(6, 4, 3, 5),
  "bn.weight": normal(6),
  "bn.bias": normal(6),
  "bn.running_mean": normal(6),
  "bn.running_var": np.abs(normal(6)),
  "head.0.weight": normal(7, 6),
  "head.0.bias": normal(7),
}
TEMPLATE = template(
  params__conv__kernel=(3, 5, 4, 6),
  params__bn__scale=(6,),
  params__bn__bias=(6,),
  batch_stats__bn__mean=(6,),
  batch_stats__bn__var=(6,),
  params__head__0__kernel=(6, 7),
  params__head__0__bias=(7,),
)


def changed(**entries):
  """Returns the state dict with some entries set, or left out where None."""
  merged = STATE_DICT | {k.replace("__", "."): v for k, v in entries.items()}
  return {name: value for name, value in merged.items() if value is not None}


def test_every_entry_arrives_at_its_place():
  flat = trees.flatten(torch_names.torch_to_flax(STATE_DICT, TEMPLATE))
  for (h, w, i, o), value in np.ndenumerate(flat["params/conv/kernel"]):
    assert value == STATE_DICT["conv.weight"][o, i, h, w]
  np.testing.assert_array_equal(
    flat["params/head/0/kernel"], STATE_DICT["head.0.weight"].T
  )
  for path, name in {
    "params/bn/scale": "bn.weight",
    "params/bn/bias": "bn.bias",
    "batch_stats/bn/mean": "bn.running_mean",
    "batch_stats/bn/var": "bn.running_var",
    "params/head/0/bias": "head.0.bias",
  }.items():
    np.testing.assert_array_equal(flat[path], STATE_DICT[name])


def test_flax_to_torch_is_the_exact_inverse():
  variables = torch_names.torch_to_flax(STATE_DICT, TEMPLATE)
  back = torch_names.flax_to_torch(variables)
  assert back.keys() == STATE_DICT.keys()
  for name, array in back.items():
    assert array.dtype == STATE_DICT[name].dtype
    np.testing.assert_array_equal(array, STATE_DICT[name])
  again = torch_names.torch_to_flax(back, TEMPLATE)
  assert jax.tree.structure(again) == jax.tree.structure(TEMPLATE)
  jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_saved_by_safetensors_the_inverse_is_read_back(tmp_path):
  variables = torch_names.torch_to_flax(STATE_DICT, TEMPLATE)
  path = tmp_path / "w.safetensors"
  safetensors_numpy.save_file(torch_names.flax_to_torch(variables), path)
  arrays = torch_names.read_safetensors(str(path))
  assert arrays.keys() == STATE_DICT.keys()
  for name, array in arrays.items():
    np.testing.assert_array_equal(array, STATE_DICT[name])


@pytest.mark.parametrize(("groups", "features"), [(1, 10), (2, 10), (4, 8)])
def test_convolutions_with_groups_compute_the_same_in_torch(groups, features):
  torch = pytest.importorskip("torch")
  weight = normal(features, 4 // groups, 3, 3)
  images = normal(2, 9, 8, 4)
  conv = nn.Conv(
    features,
    (3, 3),
    strides=2,
    padding=1,
    feature_group_count=groups,
    use_bias=False,
    name="conv",
  )
  shape = template(params__conv__kernel=(3, 3, 4 // groups, features))
  kernel = torch_names.torch_to_flax({"conv.weight": weight}, shape)
  ours = conv.apply({"params": kernel["params"]["conv"]}, images)
  theirs = torch.nn.functional.conv2d(
    torch.tensor(images).permute(0, 3, 1, 2),
    torch.tensor(weight),
    stride=2,
    padding=1,
    groups=groups,
  )
  theirs = theirs.permute(0, 2, 3, 1).numpy()
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_depthwise_and_other_ranks_follow_the_same_rule():
  cases = {
    (8, 1, 3, 3): (3, 3, 1, 8),
    (5, 4, 3): (3, 4, 5),
    (5, 4, 1, 2, 3): (1, 2, 3, 4, 5),
  }
  for theirs, ours in cases.items():
    shape = template(params__conv__kernel=ours)
    weight = normal(*theirs)
    loaded = torch_names.torch_to_flax({"conv.weight": weight}, shape)
    kernel = loaded["params"]["conv"]["kernel"]
    np.testing.assert_array_equal(kernel, np.moveaxis(weight, (0, 1), (-1, -2)))


def test_embeddings_keep_their_axes():
  weight = normal(5, 3)
  shape = template(params__words__embedding=(5, 3))
  loaded = torch_names.torch_to_flax({"words.weight": weight}, shape)
  np.testing.assert_array_equal(loaded["params"]["words"]["embedding"], weight)


def test_halves_become_the_templates_float32():
  halves = {k: v.astype(np.float16) for k, v in STATE_DICT.items()}
  variables = torch_names.torch_to_flax(halves, TEMPLATE)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {
    np.dtype("float32")
  }
  back = torch_names.flax_to_torch(variables)
  for name, array in back.items():
    np.testing.assert_array_equal(array, halves[name].astype(np.float32))


def test_counters_are_dropped():
  state_dict = changed(bn__num_batches_tracked=np.array(3))
  variables = torch_names.torch_to_flax(state_dict, TEMPLATE)
  assert torch_names.flax_to_torch(variables).keys() == STATE_DICT.keys()


def test_variables_do_not_share_memory_with_the_weights():
  # JAX may keep a NumPy array as it is where it is aligned to 64 bytes.
  memory = np.zeros(4 * 6 + 64, np.uint8)
  start = -memory.ctypes.data % 64
  bias = memory[start : start + 4 * 6].view(np.float32)
  shape = template(params__bn__bias=(6,))
  loaded = torch_names.torch_to_flax({"bn.bias": bias}, shape)
  bias += 1
  np.testing.assert_array_equal(loaded["params"]["bn"]["bias"], np.zeros(6))


def test_torch_modules_give_and_take_state_dicts():
  torch = pytest.importorskip("torch")
  module = torch.nn.Sequential()
  module.add_module("conv", torch.nn.Conv2d(4, 6, (3, 5), bias=False))
  module.add_module("bn", torch.nn.BatchNorm2d(6))
  module.add_module("head", torch.nn.Sequential(torch.nn.Linear(6, 7)))
  variables = torch_names.torch_to_flax(module.state_dict(), TEMPLATE)
  back = torch_names.flax_to_torch(variables)
  expected = {k: v.clone() for k, v in module.state_dict().items()}
  with torch.no_grad():
    for parameter in module.parameters():
      parameter.zero_()
  module.load_state_dict({k: torch.from_numpy(v) for k, v in back.items()})
  for name, tensor in module.state_dict().items():
    assert torch.equal(tensor, expected[name]), name


def test_all_that_is_wrong_is_said_in_one_message():
  infinite = STATE_DICT["bn.bias"].copy()
  infinite[2] = np.inf
  nan = STATE_DICT["head.0.bias"].copy()
  nan[0] = np.nan
  state_dict = changed(
    bn__running_mean=None,
    module__fc__weight=normal(2),
    head__0__weight=normal(6, 7),
    bn__bias=infinite,
    head__0__bias=nan,
  )
  with pytest.raises(errors.InputError) as caught:
    torch_names.torch_to_flax(state_dict, TEMPLATE)
  message = str(caught.value)
  assert "1 missing (bn.running_mean)" in message
  assert "1 extra (module.fc.weight)" in message
  assert "head.0.weight is (6, 7), the model has (7, 6)" in message
  assert "2 NaN or infinite (bn.bias, head.0.bias)" in message


def test_long_lists_are_cut_with_a_count():
  extra = {f"fc{i}.weight": normal(2, 2) for i in range(9)}
  expected = re.escape(
    "9 extra (fc0.weight, fc1.weight, fc2.weight, fc3.weight, fc4.weight, "
    "and 4 more)"
  )
  with pytest.raises(errors.InputError, match=expected):
    torch_names.torch_to_flax(STATE_DICT | extra, TEMPLATE)


@pytest.mark.parametrize("shape", [(3,), (1, 2, 3, 4, 5, 6)])
def test_kernels_of_ranks_that_torch_lacks_are_refused(shape):
  variables = template(params__attention__kernel=shape)
  message = f"params/attention/kernel .*has rank {len(shape)}"
  with pytest.raises(errors.InputError, match=message):
    torch_names.torch_to_flax({"attention.weight": normal(*shape)}, variables)


def test_variables_without_a_counterpart_are_refused():
  with pytest.raises(errors.InputError, match="params/cell/lambda has no"):
    torch_names.flax_to_torch({"params": {"cell": {"lambda": normal(3)}}})
  with pytest.raises(errors.InputError, match="kernel has no counterpart"):
    torch_names.flax_to_torch({"kernel": normal(3, 3)})


def test_compressed_kernels_have_to_be_decoded_first():
  kernel = vq_array.VQArray(
    jnp.zeros((2, 4)),
    jnp.zeros((5, 1), jnp.uint8),
    (4, 5),
    blocks.BlockSpec(4),
  )
  variables = {"params": {"fc": {"kernel": kernel}}}
  with pytest.raises(errors.InputError, match="decode compressed kernels"):
    torch_names.flax_to_torch(variables)
  decoded = vq_array.decode_params(variables)
  assert torch_names.flax_to_torch(decoded)["fc.weight"].shape == (5, 4)


def test_a_missing_file_is_named(tmp_path):
  path = tmp_path / "resnet.safetensors"
  with pytest.raises(errors.InputError, match=f"no weights file {path}"):
    torch_names.read_safetensors(path)
  with pytest.raises(errors.InputError, match="no weights file"):
    torch_names.read_safetensors(tmp_path)


def test_damaged_and_foreign_files_are_refused(tmp_path):
  whole = safetensors_numpy.save(STATE_DICT)
  for content in (b"", whole[:-3], whole[:20], b"PK\x03\x04" * 99):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(errors.InputError, match="incomplete or not a safet"):
      torch_names.read_safetensors(path)


def test_bfloat16_files_are_read(tmp_path):
  path = tmp_path / "w.safetensors"
  halves = np.asarray(jnp.arange(7, dtype=jnp.bfloat16))
  safetensors_numpy.save_file({"fc.bias": halves}, path)
  loaded = torch_names.torch_to_flax(
    torch_names.read_safetensors(path), template(params__fc__bias=(7,))
  )
  np.testing.assert_array_equal(loaded["params"]["fc"]["bias"], np.arange(7.0))


def test_types_that_numpy_lacks_are_refused(tmp_path):
  path = tmp_path / "w.safetensors"
  weights = np.asarray(jnp.ones(3, jnp.float8_e5m2))
  safetensors_numpy.save_file({"fc.bias": weights}, path)
  with pytest.raises(errors.InputError, match="float8_e5m2.*store them as"):
    torch_names.read_safetensors(path)

import importlib
import os
import subprocess
import sys

import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import strategies as st

from pqf_jax import errors, pack
from pqf_jax.core import plan as plans
from pqf_jax.core import trees, vq_array
from pqf_jax.pipeline import job


class Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Conv(8, (3, 3), use_bias=False, name="conv")(x)
    # A large epsilon shows a fold that forgets it.
    norm = nn.BatchNorm(use_running_average=True, epsilon=0.1, name="bn")
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


@pytest.fixture(scope="module")
def compressed():
  images = jnp.ones((2, 6, 6, 4))
  dense = _random(jax.eval_shape(Net().init, jax.random.key(0), images))
  plan = plans.make_plan(RULES, dense)
  # float16 codebooks, so that packing rounds nothing away.
  rng = np.random.default_rng(1)
  nodes = {}
  for path, layer in plan.items():
    kernel = trees.flatten(dense)[path]
    c_out, m, length = layer.spec.layout(kernel.shape)
    codebook = rng.normal(size=(layer.num_codes, length)).astype(np.float16)
    codes = rng.integers(0, layer.num_codes, (c_out, m)).astype(np.uint8)
    nodes[path] = vq_array.VQArray(
      jnp.asarray(codebook, jnp.float32), codes, kernel.shape, layer.spec
    )
  return trees.replace(dense, nodes), plan


@hypothesis.given(st.integers(1, 16), st.integers(1, 100), st.integers(0, 9))
@hypothesis.settings(deadline=None, max_examples=50)
def test_codes_take_exactly_their_bits(bits, count, seed):
  rng = np.random.default_rng(seed)
  num_codes = int(rng.integers(2 ** (bits - 1) + 1, 2**bits + 1))
  codes = rng.integers(0, num_codes, count)
  packed = pack.pack_codes(codes, num_codes)
  assert packed.nbytes == -(-count * bits // 8)
  np.testing.assert_array_equal(
    pack.unpack_codes(packed, num_codes, count), codes
  )


def test_loaded_variables_give_the_same_logits(compressed, tmp_path):
  variables, _ = compressed
  pack.save(tmp_path / "m.safetensors", variables, norm_epsilon=0.1)
  loaded = pack.load(tmp_path / "m.safetensors")
  images = np.random.default_rng(2).normal(size=(3, 6, 6, 4))
  apply = jax.jit(Net().apply)
  expected = apply(variables, images.astype(np.float32))
  got = apply(loaded, images.astype(np.float32))
  np.testing.assert_allclose(got, expected, rtol=1e-5)
  assert jax.tree.structure(loaded) == jax.tree.structure(variables)


def test_size_is_the_predicted_one_to_the_byte(compressed):
  variables, plan = compressed
  packed = pack.pack_model(variables, norm_epsilon=0.1, architecture={})
  assert (
    packed.payload_bytes == plans.predict_size(plan, variables).payload_bytes
  )


def test_packing_what_was_loaded_changes_nothing_but_norms(
  compressed, tmp_path
):
  variables, _ = compressed
  first = pack.save(tmp_path / "a", variables, norm_epsilon=0.1)
  again = pack.save(tmp_path / "b", pack.load(tmp_path / "a"), norm_epsilon=0.1)
  for name, buffer in first.buffers.items():
    np.testing.assert_allclose(again.buffers[name], buffer, rtol=1e-6)


def test_architecture_is_kept(compressed, tmp_path):
  variables, _ = compressed
  pack.save(tmp_path / "m", variables, architecture={"name": "net", "depth": 3})
  header = pack.read_header(tmp_path / "m")
  assert header["architecture"] == {"name": "net", "depth": 3}


def test_bad_files_are_named(compressed, tmp_path):
  variables, _ = compressed
  path = tmp_path / "m.safetensors"
  with pytest.raises(errors.InputError, match="no weights file.*m.safetensors"):
    pack.load(path)
  pack.save(path, variables)
  data = path.read_bytes()
  path.write_bytes(data[:-10])
  with pytest.raises(errors.InputError, match="truncated"):
    pack.load(path)
  path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
  with pytest.raises(errors.InputError, match="damaged"):
    pack.load(path)
  safetensors.numpy.save_file({"x": np.ones(3)}, path)
  with pytest.raises(errors.InputError, match="pqf_jax did not pack"):
    pack.load(path)


def test_a_codebook_beyond_float16_is_named(compressed):
  variables, _ = compressed
  large = variables["params"]["conv"]["kernel"].codebook * 1e6
  variables = trees.replace(variables, {"params/conv/kernel/codebook": large})
  with pytest.raises(errors.InputError, match="params/conv/kernel.*float16"):
    pack.pack_model(variables, norm_epsilon=0.1, architecture={})


def test_loading_imports_no_training_code(compressed, tmp_path):
  variables, _ = compressed
  pack.save(tmp_path / "m.safetensors", variables)
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
  _, template = job.build_network(config)
  plan = job.make_plan(config, template)
  variables = jax.tree.map(
    lambda leaf: np.zeros(leaf.shape, leaf.dtype),
    plans.compressed_shapes(plan, template),
  )
  path = tmp_path / "m.safetensors"
  packed = pack.save(path, variables, architecture=dict(config.model))
  assert (
    packed.payload_bytes == plans.predict_size(plan, template).payload_bytes
  )
  assert path.stat().st_size <= 1.015 * packed.payload_bytes

"""Exported programs run where only jax is installed."""

import math
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pqf_jax
from pqf_jax import errors
from pqf_jax.core import blocks, vq_array
from pqf_jax.packing import bits


class Network(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(64, (3, 3), use_bias=False, name="conv")(x))
    x = nn.BatchNorm(use_running_average=True, name="norm")(x)
    return nn.Dense(96, name="fc")(nn.relu(x).mean((1, 2)))


NETWORK = Network()
IMAGES = np.random.default_rng(0).standard_normal((2, 5, 5, 32), np.float32)


def quantized(shape, num_codes, channels, seed):
  draws = np.random.default_rng(seed)
  spec = blocks.BlockSpec(channels)
  c_out, m, length = spec.layout(shape)
  return vq_array.VQArray(
    draws.standard_normal((num_codes, length), np.float32),
    draws.integers(0, num_codes, (c_out, m), vq_array.code_dtype(num_codes)),
    shape,
    spec,
  )


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
  """The file of a network, whose codes have 6 and 11 bits."""
  path = tmp_path_factory.mktemp("packed") / "model.safetensors"
  variables = NETWORK.init(jax.random.key(0), IMAGES)
  params = variables["params"]
  params["conv"]["kernel"] = quantized((3, 3, 32, 64), 64, 1, 1)
  params["fc"]["kernel"] = quantized((64, 96), 1200, 1, 2)
  pqf_jax.save(path, variables, norm_epsilon=1e-5)
  return path


RUN = """
import sys
import numpy as np
from jax import export
program = export.deserialize(open(sys.argv[1], "rb").read())
outputs = program.call(np.load(sys.argv[2]))
np.save(sys.argv[3], outputs)
assert not {"flax", "pqf_jax"} & sys.modules.keys()
"""


def test_a_program_runs_with_jax_alone(packed, tmp_path):
  variables = pqf_jax.load(packed)
  file = tmp_path / "model.stablehlo"
  (batch,) = jax.export.symbolic_shape("batch")
  sample = jax.ShapeDtypeStruct((batch, *IMAGES.shape[1:]), np.float32)
  pqf_jax.export(file, NETWORK.apply, variables, sample)
  np.save(tmp_path / "images.npy", IMAGES)
  subprocess.run(
    [sys.executable, "-c", RUN, file, "images.npy", "outputs.npy"],
    cwd=tmp_path,  # where no pqf_jax is found
    env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    check=True,
  )
  wanted = NETWORK.apply(variables, IMAGES)
  np.testing.assert_allclose(
    np.load(tmp_path / "outputs.npy"), wanted, rtol=1e-5, atol=1e-5
  )
  exported = jax.export.deserialize(file.read_bytes())
  assert exported.platforms == ("cpu", "cuda", "tpu")


@pytest.mark.parametrize("codebook", ["float16", "int8"])
def test_variables_are_as_small_as_in_the_file(tmp_path, codebook):
  kernel = quantized((512, 128), 4096, 8, 0)
  path, file = tmp_path / "packed", tmp_path / "program"
  pqf_jax.save(
    path, {"kernel": kernel}, storage=pqf_jax.Storage(codebook=codebook)
  )
  variables = pqf_jax.load(path)
  pqf_jax.export(file, lambda v, x: x @ v["kernel"], variables, np.ones(512))
  assert file.stat().st_size <= 1.1 * path.stat().st_size + 10_000


def test_nothing_is_rounded(tmp_path):
  variables = {
    "small": np.array([1.5, -0.25, 0.0], np.float32),
    "signed": np.array([1.0, -0.0], np.float32),
    "exact": np.array([1 / 3, 1e30, -0.0], np.float32),
    "huge": np.array([3e38, -1.0], np.float32),
    "tiny": np.array([1e-40, -1e-45], np.float32),
    "half": np.array([0.1, 65504], np.float16),
    "brain": jnp.array([0.1, 3e38], jnp.bfloat16),
    "nan": np.array([np.nan, np.inf], np.float32),
    "count": np.array([7, -1], np.int32),
    "flag": np.array(True),
    "empty": np.zeros((0, 2), np.float32),
    "kernel": quantized((6, 5), 7, 2, 0),
    "one": quantized((6, 5), 1, 2, 0),
  }
  pqf_jax.export(tmp_path / "file", jax.tree.leaves, variables)
  program = jax.export.deserialize((tmp_path / "file").read_bytes())
  wanted = jax.tree.map(np.asarray, variables)
  for found, array in zip(
    jax.tree.leaves(program.call()), jax.tree.leaves(wanted), strict=True
  ):
    assert found.dtype == array.dtype
    assert np.asarray(found).tobytes() == array.tobytes()


@pytest.mark.parametrize("num_bits", [1, 3, 8, 11, 16])
def test_codes_are_unpacked_in_a_program(num_bits):
  num_codes = 2**num_bits
  codes = np.random.default_rng(num_bits).integers(0, num_codes, 8 * 7 + 3)
  packed = bits.pack_codes(codes, num_codes)
  found = jax.jit(bits.unpack_traced, static_argnums=(1, 2))(
    packed, num_codes, codes.size
  )
  np.testing.assert_array_equal(found, codes)
  assert found.dtype == bits.unpack_codes(packed, num_codes, codes.size).dtype


def test_a_stacked_kernel_is_exported(tmp_path):
  kernels = [quantized((8, 6), 5, 2, seed) for seed in range(3)]
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *kernels)
  pqf_jax.export(tmp_path / "file", lambda v: v["k"].decode(), {"k": stacked})
  program = jax.export.deserialize((tmp_path / "file").read_bytes())
  wanted = np.stack([kernel.decode() for kernel in kernels])
  np.testing.assert_array_equal(program.call(), wanted)


def test_bad_input_is_refused_before_any_work(tmp_path, monkeypatch):
  kernel = quantized((4, 4), 4, 2, 0)
  kernel = kernel.replace(codes=np.full_like(kernel.codes, 4))
  with pytest.raises(errors.InputError, match="k has the code 4, but 4 code"):
    pqf_jax.export(tmp_path / "x", math.nan, {"k": kernel})
  with pytest.raises(errors.InputError, match="give some of cpu, cuda"):
    pqf_jax.export(tmp_path / "x", math.nan, {}, platforms=("gpu",))
  monkeypatch.setitem(sys.modules, "flatbuffers", None)
  with pytest.raises(errors.InputError, match=r"pqf_jax\[export\]"):
    pqf_jax.export(tmp_path / "x", math.nan, {})
  assert not list(tmp_path.iterdir())

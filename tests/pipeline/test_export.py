"""`config.mode=export`: the file of a network for torch's users."""

import types

import jax
import numpy as np
import pytest
import safetensors.numpy

import pqf_jax
from pqf_jax import errors, models, pipeline
from pqf_jax.core import blocks, vq_array
from pqf_jax.models import torch_names
from tests.pipeline import tiny


def _compressed():
  variables = tiny.make(num_classes=10).init(
    jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32)
  )
  draws = np.random.default_rng(0)
  spec = blocks.BlockSpec(4)
  variables["params"]["fc"]["kernel"] = vq_array.VQArray(
    draws.standard_normal((16, 4), np.float32),
    draws.integers(0, 16, (10, 8), np.uint8),
    (32, 10),
    spec,
  )
  variables["batch_stats"]["bn0"]["mean"] += 0.5
  return variables


@pytest.fixture
def packed(config, tmp_path):
  """The config of an export, of a packed file."""
  path = tmp_path / "packed.safetensors"
  pqf_jax.save(path, _compressed(), norm_epsilon=1e-3)
  config.mode, config.weights = "export", str(path)
  return config


def test_torchs_file_holds_the_same_bits(packed, tmp_path):
  pipeline.run(packed, str(tmp_path / "run"))
  state_dict = safetensors.numpy.load_file(tmp_path / "run/torch.safetensors")
  variables = pqf_jax.load(packed.weights)
  dense = pqf_jax.decode_params(variables)
  kernel = np.asarray(dense["params"]["conv0"]["kernel"])
  np.testing.assert_array_equal(
    state_dict["conv0.weight"], kernel.transpose(3, 2, 0, 1)
  )
  again = torch_names.torch_to_flax(state_dict, dense)
  for left, right in zip(
    jax.tree.leaves(again), jax.tree.leaves(dense), strict=True
  ):
    assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


@pytest.mark.parametrize("reads", ["nothing", "other names", "other values"])
def test_what_the_model_would_not_read_back_is_refused(packed, tmp_path, reads):
  def load_torch(state_dict, template):
    if reads == "other names":
      state_dict = {f"net.{name}": x for name, x in state_dict.items()}
    variables = torch_names.torch_to_flax(state_dict, template)
    variables["params"]["fc"]["kernel"] = (
      variables["params"]["fc"]["kernel"] + 1
    )
    return variables

  model = types.SimpleNamespace(make=tiny.make)
  if reads != "nothing":
    model.load_torch = load_torch
  models.register(f"reads {reads}", model)
  packed.model.name = f"reads {reads}"
  with pytest.raises(errors.InputError, match="not known for writing"):
    pipeline.run(packed, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()

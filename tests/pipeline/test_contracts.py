"""Networks that lack an optional member: accepted, or refused early."""

import contextlib
import json
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from pqf_jax import errors, models, pipeline
from pqf_jax.models import contract, torch_names
from tests.pipeline import tiny


class Plain(nn.Module):
  """No dtype, no norms, no `train`."""

  num_classes: int = 10

  @nn.compact
  def __call__(self, images):
    x = nn.relu(nn.Conv(16, (3, 3), strides=2, name="conv0")(images))
    x = nn.relu(nn.Conv(32, (3, 3), strides=2, name="conv1")(x))
    return nn.Dense(self.num_classes, name="fc")(x.mean((1, 2)))


class OwnNorms(nn.Module):
  """Batch norms without a field for their epsilon or their axis."""

  num_classes: int = 10

  @nn.compact
  def __call__(self, images, train=False):
    x = nn.Conv(16, (3, 3), strides=2, name="conv0")(images)
    x = nn.BatchNorm(use_running_average=not train, name="bn0")(x)
    x = nn.relu(nn.Conv(32, (3, 3), name="conv1")(nn.relu(x)))
    return nn.Dense(self.num_classes, name="fc")(x.mean((1, 2)))


class KnownNorms(OwnNorms):
  norm_epsilon: float = 1e-5


class Maps(Plain):
  @nn.compact
  def __call__(self, images):
    return nn.Conv(10, (3, 3), name="conv0")(images)


class TwoInputs(Plain):
  @nn.compact
  def __call__(self, images, sizes):
    x = nn.Conv(16, (3, 3), name="conv0")(images.astype(float))
    return nn.Dense(10, name="fc")(x.mean((1, 2)))


class Dropping(nn.Module):
  """Needs a random key in training."""

  num_classes: int = 10

  @nn.compact
  def __call__(self, images, train=False):
    x = nn.relu(nn.Conv(32, (3, 3), strides=2, name="conv1")(images))
    x = nn.Dropout(0.5, deterministic=not train)(x.mean((1, 2)))
    return nn.Dense(self.num_classes, name="fc")(x)


def _use(config, network):
  """The recipe with this network, which has no `load_torch`."""
  name = network.__name__
  model = types.SimpleNamespace(make=lambda num_classes: network(num_classes))
  with contextlib.suppress(errors.InputError):  # registered by a test before
    models.register(name, model)
  config.model.name = name
  # One kernel of one shape, whose k-means is compiled once for all.
  config.rules = (("params/fc/kernel", 16, 4, 10), ("params/.*", None))
  config.train.epochs = config.finetune.epochs = 1
  return config


@pytest.mark.parametrize("network", [Plain, KnownNorms, Dropping])
def test_what_a_network_may_lack_is_not_missed(config, tmp_path, network):
  pipeline.run(_use(config, network), str(tmp_path))
  results = json.loads((tmp_path / "results.json").read_text())
  assert results["top1_packed"] == pytest.approx(
    results["top1_finetuned"], abs=0.02
  )


@pytest.mark.parametrize(
  ("network", "settings", "message"),
  [
    (Plain, {"dtype": "bfloat16"}, "'Plain' has no field dtype"),
    (OwnNorms, {}, "'OwnNorms' has batch norms, bn0 .*no field norm_epsilon"),
    (Maps, {}, r"'Maps' maps one image to .*\(1, 64, 64, 10\).*\(1, 10\)"),
    (Plain, {"task": "detection"}, "'Plain' cannot take .* 'detection', uint8"),
    (TwoInputs, {"task": "detection"}, "has no method training_outputs"),
    (Plain, {"backbone": "x.pth"}, "no weights file x.pth"),
  ],
)
def test_what_a_config_asks_too_much_of_is_refused_before_any_work(
  config, tmp_path, network, settings, message
):
  config = _use(config, network)
  config.update(settings)
  with pytest.raises(errors.InputError, match=message):
    pipeline.run(config, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_norms_over_several_devices_need_an_axis():
  network = KnownNorms()
  template = {"params": {}, "batch_stats": {"bn0": jnp.zeros(16)}}
  with pytest.raises(errors.InputError, match="no field norm_axis"):
    contract.check_trainable(
      "own", network, template, dtype="float32", norm_axis="data"
    )
  contract.check_trainable(
    "own", network, template, dtype="float32", norm_axis=None
  )
  contract.check_trainable(
    "own", Plain(), {"params": {}}, dtype="float32", norm_axis="data"
  )


def test_weights_with_torchs_names_need_a_reader(config, tmp_path):
  config = _use(config, Plain)
  variables = tiny.Tiny(10).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
  state_dict = torch_names.flax_to_torch(variables)
  safetensors.numpy.save_file(
    {name: np.asarray(array) for name, array in state_dict.items()},
    tmp_path / "torch.safetensors",
  )
  config.weights = str(tmp_path / "torch.safetensors")
  with pytest.raises(errors.InputError, match="'Plain' has no function load_"):
    pipeline.run(config, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_a_model_that_makes_nothing_is_refused(config, tmp_path):
  models.register("nothing", types.SimpleNamespace())
  config.model.name = "nothing"
  with pytest.raises(errors.InputError, match="'nothing' has no function make"):
    pipeline.run(config, str(tmp_path / "run"))

"""A network and a config so small that the whole job takes seconds."""

import sys
import types

import flax.linen as nn
import jax
import ml_collections
import pytest

from configs import common
from pqf_jax.models import torch_weights


class Tiny(nn.Module):
  num_classes: int
  norm_epsilon: float = 1e-3

  @nn.compact
  def __call__(self, images, train=False):
    x = images
    for i, features in enumerate((16, 32)):
      x = nn.Conv(features, (3, 3), strides=2, use_bias=False, name=f"conv{i}")(
        x
      )
      x = nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=self.norm_epsilon,
        name=f"bn{i}",
      )(x)
      x = nn.relu(x)
    return nn.Dense(self.num_classes, name="fc")(x.mean((1, 2)))


@pytest.fixture(autouse=True)
def _tiny_architecture(monkeypatch):
  module = types.ModuleType("pqf_jax.models.tiny")
  module.make = lambda *, num_classes: Tiny(num_classes)
  module.load_torch = torch_weights.torch_to_flax
  monkeypatch.setitem(sys.modules, "pqf_jax.models.tiny", module)
  monkeypatch.setattr(
    "pqf_jax.models.get_model",
    lambda name: sys.modules[f"pqf_jax.models.{name}"],
  )
  # The training stack multiplies floats by integer steps.
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


@pytest.fixture
def config() -> ml_collections.ConfigDict:
  config = common.get_config()
  config.name = "tiny"
  config.model.name = "tiny"
  config.model.num_classes = 10
  config.data.name = "digits"
  config.data.image_size = 8
  config.rules = (
    ("params/conv0/kernel", None),
    ("params/conv1/kernel", 32, 2, 10),
    ("params/fc/kernel", 16, 4, 10),
  )
  config.train.epochs = 3
  config.train.learning_rate = 1e-2
  config.finetune.epochs = 2
  config.checkpoint_steps = 5
  return config

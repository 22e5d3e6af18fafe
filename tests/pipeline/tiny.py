"""A network and a config so small that the whole job takes seconds.

    python -m tests.pipeline.tiny WORKDIR [key=value ...]

runs it as one process of a cluster; the tests of several processes start it.
"""

import sys

import flax.linen as nn
import ml_collections
from jax.typing import DTypeLike

from configs import common
from pqf_jax import errors
from pqf_jax.models import torch_names


class Tiny(nn.Module):
  num_classes: int
  norm_epsilon: float = 1e-3
  norm_axis: str | None = None
  dtype: DTypeLike | None = None  # that of the variables

  @nn.compact
  def __call__(self, images, train=False):
    x = images
    for i, features in enumerate((16, 32)):
      x = nn.Conv(
        features,
        (3, 3),
        strides=2,
        use_bias=False,
        dtype=self.dtype,
        name=f"conv{i}",
      )(x)
      x = nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=self.norm_epsilon,
        axis_name=self.norm_axis,
        dtype=self.dtype,
        name=f"bn{i}",
      )(x)
      x = nn.relu(x)
    return nn.Dense(self.num_classes, name="fc")(x.mean((1, 2)))


def make(*, num_classes):
  return Tiny(num_classes)


load_torch = torch_names.torch_to_flax


def get_config() -> ml_collections.ConfigDict:
  """Three epochs of training and two of fine-tuning on 8 x 8 digits."""
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
  config.calibrate.images = 0  # tests of this stage turn it on
  config.train.epochs = 3
  config.train.learning_rate = 1e-2
  config.finetune.epochs = 2
  config.checkpoint_steps = 5
  return config


def main() -> None:
  """Runs the pipeline in this process, as main.py would."""
  workdir, *settings = sys.argv[1:]
  from pqf_jax import models, pipeline

  models.register("tiny", "tests.pipeline.tiny")
  config = get_config()
  for setting in settings:
    name, _, value = setting.partition("=")
    *parents, last = name.split(".")
    part = config
    for parent in parents:
      part = part[parent]
    part[last] = type(part[last])(value)
  try:
    pipeline.run(config, workdir)
  except errors.Preempted as stopped:
    sys.stdout.write(f"{stopped}\n")
    sys.exit(143)
  except errors.InputError as error:
    sys.stdout.write(f"error: {error}\n")
    sys.exit(2)


if __name__ == "__main__":
  main()

"""The README's Python runs as it stands."""

import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pqf_jax import pack
from pqf_jax.models import resnet

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
SETUP = re.findall(r"```sh setup\n(.*?)```", README, re.S)


class Own(nn.Module):
  """A network with the paths that the README's rules name."""

  @nn.compact
  def __call__(self, images):
    x = nn.relu(nn.Conv(16, (3, 3), name="stem")(images))
    x = nn.relu(nn.Conv(32, (3, 3), name="conv")(x))
    return nn.Dense(64, name="head")(x.mean((1, 2)))


def test_two_lines_set_everything_up():
  (block,) = SETUP
  job, tests = block.strip().splitlines()
  assert job.endswith("python main.py --config=configs/resnet18.py")
  assert tests.endswith("pytest -n auto")


def test_a_packed_network_is_used_as_described(tmp_path, monkeypatch):
  model = resnet.make(depth=18, num_classes=10)
  images = jnp.ones((1, 32, 32, 3))
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
  monkeypatch.chdir(tmp_path)
  pack.save("runs/resnet18_digits/model.safetensors", variables)
  names = {"images": images}
  exec(BLOCKS[0], names)
  assert names["logits"].shape == (1, 10)


def test_a_network_of_ones_own_is_compressed_as_described(
  tmp_path, monkeypatch, capsys
):
  images = jnp.ones((2, 8, 8, 3))
  model = Own()
  variables = model.init(jax.random.key(0), images)
  monkeypatch.chdir(tmp_path)
  short = BLOCKS[1].replace("channels=", "kmeans_steps=5, channels=")
  exec(short, {"model": model, "variables": variables, "images": images})
  assert (tmp_path / "model.safetensors").exists()
  assert float(capsys.readouterr().out.split()[1]) > 3

"""Additions that docs/architecture.md describes: a toy one of each."""

import importlib.util
import json
import pathlib
import re
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from flax.core import meta

from pqf_jax import data, finetune, models, pipeline, tasks
from pqf_jax.core import blocks, vq_array
from pqf_jax.data import sources
from pqf_jax.tasks import classification
from tests.pipeline import tiny

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text()


@pytest.fixture(autouse=True)
def _promotion():
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


@pytest.fixture
def config():
  """Seconds of training and fine-tuning on digits."""
  models.register("tiny", "tests.pipeline.tiny")
  config = tiny.get_config()
  config.train.epochs = config.finetune.epochs = 1
  # One kernel of one shape, whose k-means is compiled once for all.
  config.rules = (("params/fc/kernel", 16, 4, 10), ("params/.*", None))
  return config


def _run(config, folder):
  pipeline.run(config, str(folder))
  return json.loads((folder / "results.json").read_text())


class Toy(nn.Module):
  num_classes: int

  @nn.compact
  def __call__(self, images):
    x = nn.relu(nn.Conv(32, (3, 3), strides=2, name="conv1")(images))
    return nn.Dense(self.num_classes, name="fc")(x.mean((1, 2)))


def test_a_network(config, tmp_path):
  module = types.ModuleType("toy_network")
  module.make = lambda *, num_classes: Toy(num_classes)
  models.register("toy", module)
  config.model.name = "toy"
  assert _run(config, tmp_path)["ratio"] > 1


class Parity:
  """Whether a digit is even: another loss, metric and number of outputs."""

  metrics = {"even": "even or odd"}

  def __init__(self):
    self._base = classification.TASK

  def __getattr__(self, name):
    return getattr(self._base, name)

  def load(self, config, network):
    loaded = self._base.load(config, network)

    def make_loss(share):
      def loss_fn(variables, batch, key):
        del key
        images = batch["image"].astype(jnp.float32) / 255
        logits, updated = network.apply(
          variables, images, train=True, mutable=["batch_stats"]
        )
        even = logits[:, 0::2].mean(1) - logits[:, 1::2].mean(1)
        wanted = batch["label"] % 2 == 0
        loss = optax.sigmoid_binary_cross_entropy(even, wanted).mean()
        return loss, (updated, {})

      return loss_fn

    return loaded._replace(
      make_loss=make_loss,
      evaluate=lambda variables: {"even": 0.5, "images": 360, "odd": 0.25},
    )


def test_a_task(config, tmp_path):
  tasks.register("parity", Parity())
  config.task = "parity"
  results = _run(config, tmp_path)
  # No figure of an evaluation is lost; those that are declared are shown.
  assert results["metrics"] == {"even": "even or odd"}
  assert results["even_packed"] == 0.5 and results["odd_packed"] == 0.25
  assert "even or odd" in (tmp_path / "report.html").read_text().lower()


def test_a_data_set(config, tmp_path):
  rng = np.random.default_rng(0)

  def load(data_dir, image_size):
    del data_dir
    size = image_size or 8
    records = [
      {
        "image": rng.integers(0, 256, (size, size, 3), np.uint8),
        "label": i % 10,
      }
      for i in range(160)
    ]
    return sources.ImageDataset(
      name="noise",
      train=records[:128],
      test=records[128:],
      num_classes=10,
      mean=(0.5,) * 3,
      std=(0.3,) * 3,
      augment=lambda image, rng: image,
    )

  data.register("noise", load)
  config.data.name = "noise"
  assert _run(config, tmp_path)["images"] == 32


def _variables():
  node = vq_array.VQArray(
    jax.random.normal(jax.random.key(0), (8, 2)),
    jax.random.randint(jax.random.key(1), (6, 4), 0, 8).astype(jnp.uint8),
    (8, 6),
    blocks.BlockSpec(2),
  )
  return {"params": {"fc": {"kernel": node, "bias": jnp.zeros(6)}}}


BATCH = {"x": jax.random.normal(jax.random.key(2), (32, 8))}
NETWORK = nn.Dense(6, name="fc")


def _distance(variables, batch, key):
  del key
  outputs = NETWORK.apply({"params": variables["params"]["fc"]}, batch["x"])
  return jnp.square(outputs - jnp.roll(batch["x"], 1, 1)[:, :6]).mean(), (
    {},
    {},
  )


def _fit(variables, **hook):
  optimizer = finetune.cosine_adam(
    learning_rate=3e-2, final_learning_rate=1e-4, num_steps=60
  )
  step = finetune.make_finetune_step(_distance, optimizer, **hook)
  state, losses = finetune.init_state(variables, optimizer), []
  for _ in range(60):
    state, metrics = step(state, BATCH)
    losses.append(float(metrics["loss"]))
  return finetune.state_variables(state), losses


def test_a_fine_tuning_method():
  target = np.zeros((8, 6), np.float32)
  for i in range(6):
    target[(i - 1) % 8, i] = 1

  def reassign(state):
    """Every sub-vector takes the codeword nearest to what it should be."""
    node = finetune.state_variables(state)["params"]["fc"]["kernel"]
    wanted = node.spec.to_blocks(jnp.asarray(target))
    distance = jnp.square(wanted[:, :, None] - node.codebook).sum(-1)
    codes = distance.argmin(-1).astype(jnp.uint8)
    frozen = jax.tree.map(lambda leaf: codes, state.frozen)
    return state._replace(frozen=frozen)

  before = _variables()["params"]["fc"]["kernel"].codes
  fixed, fixed_losses = _fit(_variables())
  moved, moved_losses = _fit(_variables(), after_update=reassign)
  np.testing.assert_array_equal(fixed["params"]["fc"]["kernel"].codes, before)
  assert (moved["params"]["fc"]["kernel"].codes != before).any()
  assert moved_losses[-1] < 0.5 * fixed_losses[-1]


class SumOfTwo(struct.PyTreeNode, meta.AxisMetadata):
  """A residual codebook: the sum of two codewords a sub-vector."""

  first: vq_array.VQArray
  second: vq_array.VQArray

  def unbox(self):
    return self.first.decode() + self.second.decode()

  def replace_boxed(self, val):
    return val

  def add_axis(self, index, params):
    return self

  def remove_axis(self, index, params):
    return self


def test_a_codebook_type():
  variables = _variables()
  node = variables["params"]["fc"]["kernel"]
  other = node.replace(codebook=-node.codebook, codes=(node.codes + 3) % 8)
  variables["params"]["fc"]["kernel"] = SumOfTwo(node, other)
  tuned, losses = _fit(variables)
  assert losses[-1] < 0.7 * losses[0]
  sums = tuned["params"]["fc"]["kernel"]
  np.testing.assert_array_equal(sums.first.codes, node.codes)
  assert sums.unbox().shape == (8, 6)


def test_the_page_names_files_that_exist():
  named = set(re.findall(r"`((?:pqf_jax|configs|tests)/[\w/.]*)`", PAGE))
  assert len(named) > 10
  missing = [
    path for path in named if "NAME" not in path and not (ROOT / path).exists()
  ]
  assert not missing


def test_the_picture_is_that_of_the_code():
  spec = importlib.util.spec_from_file_location(
    "draw_architecture", ROOT / "docs" / "draw_architecture.py"
  )
  drawing = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(drawing)
  assert drawing.page() == PAGE, "run python docs/draw_architecture.py"
  assert "kmeans --> numerics" in PAGE


def test_the_page_has_every_room():
  rooms = {path.stem for path in (ROOT / "pqf_jax").iterdir() if path.is_dir()}
  described = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.M))
  assert rooms - {"__pycache__"} <= described

"""Tiny transformers through the whole job: sentences, text and images."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pqf_jax
from configs import lm, mask_rcnn, minilm, vit
from pqf_jax import errors, models, pipeline, tasks
from pqf_jax.core import vq_array
from pqf_jax.pipeline import job as jobs

# Sixteen codewords of two channels: k-means is compiled once for all kernels.
RULES = (
  (".*(embedding|places|tokens).*", None),
  (".*/(up|down|dense|head|query)/kernel", 16, 2, 5),
  (".*", None),
)
WORDS = ("the", "a", "cat", "dog", "sat", "ran", "on", "mat", "tree", "red")
SMALL = {"vocabulary": 20, "positions": 16, "features": 16, "heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Sentences, a vocabulary and the weights of a random BERT."""
  folder = tmp_path_factory.mktemp("sentences")
  tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
  (folder / "vocab.txt").write_text("\n".join(tokens))
  rng = np.random.default_rng(0)
  for name, count in (("train.txt", 24), ("test.txt", 10)):
    lines = [
      " ".join(rng.choice(WORDS, rng.integers(3, 9))) for _ in range(count)
    ]
    (folder / name).write_text("\n".join(lines))
  network = models.get_model("bert").make(**SMALL, hidden=32, depth=1)
  variables = network.init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))
  # Embeddings of random networks hardly differ.
  variables = jax.tree.map(lambda leaf: 3 * leaf, variables)
  pqf_jax.save(str(folder / "dense.safetensors"), variables)
  return folder


def _embedding(folder):
  config = minilm.get_config()
  config.weights = str(folder / "dense.safetensors")
  config.data.dir = str(folder)
  config.model.update(SMALL, hidden=32, depth=1)
  config.data.length = 10
  config.rules = RULES
  config.finetune.epochs = 4
  config.finetune.batch_size = 8
  config.finetune.learning_rate = 1e-2
  config.finetune_from = "quantized"
  config.eval_batch_size = 4
  return config


def _run(config, folder):
  # One evaluation and one checkpoint a training.
  config.train.evaluation_epochs = config.finetune.evaluation_epochs = 100
  pipeline.run(config, str(folder))
  return json.loads((folder / "results.json").read_text())


def test_embeddings_follow_those_of_the_dense_network(folder, tmp_path):
  config = _embedding(folder)
  results = _run(config, tmp_path)
  assert results["cosine_dense"] == pytest.approx(1)
  assert results["nearest_dense"] == 1
  assert results["cosine_permuted"] == pytest.approx(1, abs=1e-5)
  assert results["cosine_quantized"] < results["cosine_calibrated"]
  assert results["cosine_quantized"] < results["cosine_finetuned"]
  assert results["images"] == 10
  page = (tmp_path / "report.html").read_text()
  assert "10 test sentences" in page and "Mean cosine" in page

  # The packed file against NumPy, sentence by sentence and without padding.
  network = models.get_model("bert").make(**SMALL, hidden=32, depth=1)
  packed = pqf_jax.load(str(tmp_path / "model.safetensors"))
  assert any(map(vq_array.is_vq, jax.tree.leaves(packed, vq_array.is_vq)))
  dense = pqf_jax.load(config.weights)
  lines = (folder / "test.txt").read_text().splitlines()
  apply = jax.jit(network.apply)
  embedded = []
  for variables in (dense, packed):
    rows = []
    for line in lines:
      tokens = [4 + WORDS.index(word) for word in line.split()]
      tokens = np.array([[2, *tokens, 3] + [0] * (8 - len(tokens))])
      rows.append(np.asarray(apply(variables, tokens))[0])
    embedded.append(np.stack(rows))
  cosines = (embedded[0] * embedded[1]).sum(1)
  assert results["cosine_packed"] == pytest.approx(cosines.mean(), abs=1e-5)
  assert results["worst_packed"] == pytest.approx(cosines.min(), abs=1e-5)


def test_embeddings_are_refused_before_any_work(folder, tmp_path):
  def refused(message, **settings):
    config = _embedding(folder)
    config.update_from_flattened_dict(settings)
    with pytest.raises(errors.InputError, match=message):
      pipeline.run(config, str(tmp_path))
    assert list(tmp_path.iterdir()) == []

  refused("config.weights is empty", weights="")
  refused("share is 0, but sentences", **{"distillation.share": 0.0})
  refused("length is 17; give 3 to 16", **{"data.length": 17})
  refused("no vocabulary", **{"data.vocabulary": str(folder / "test.txt")})
  refused("compare a network with the dense one", mode="evaluate")


# Of the other tasks; a detector's are refused likewise.
SETTINGS = {
  "data.unlabelled": ".",
  "data.image_size": 8,
  "data.resize": 8,
  "data.crop": 8,
  "data.padding": 1,
  "data.augmentation": "flip",
  "data.mean": (0.5, 0.5, 0.5),
  "data.std": (0.5, 0.5, 0.5),
  "data.num_objects": 3,
  "data.length": 3,
  "data.vocabulary": "vocab.txt",
  "data.name": "coco",
  "distillation.mirrored": True,
  "distillation.temperature": 2.0,
}
USED = {
  minilm: {"data.length", "data.vocabulary"},
  lm: {"data.name", "data.length", "distillation.temperature"},
  vit: SETTINGS.keys() - {"data.num_objects", "data.length", "data.vocabulary"},
  mask_rcnn: {
    *("data.name", "data.image_size", "data.num_objects"),
    "distillation.temperature",
  },
}


@pytest.mark.parametrize("recipe", USED)
def test_what_a_task_does_not_use_is_refused(recipe):
  for name, value in SETTINGS.items():
    config = recipe.get_config()
    config.update_from_flattened_dict({name: value})
    # Without a network, which is looked at after that.
    with pytest.raises(Exception) as found:
      tasks.get(config.task).check(config, None, {}, num_devices=1)
    is_refused = "makes nothing" in str(found.value)
    assert is_refused == (name not in USED[recipe])
    assert not is_refused or f"config.{name} is {value!r}" in str(found.value)


def test_settings_of_another_model_are_refused():
  config = minilm.get_config()
  config.model.name = "decoder"
  with pytest.raises(
    errors.InputError, match="'decoder' does not take .*'hidden'"
  ):
    jobs.build_network(config)


def test_a_folder_beside_the_text_of_python_is_refused():
  config = lm.get_config()
  config.data.dir = "texts"
  network, _ = jobs.build_network(config)
  with pytest.raises(errors.InputError, match="config.data.name=text"):
    tasks.get("language").load(config, network)


def test_a_language_model_is_trained_and_compressed(tmp_path):
  config = lm.get_config()
  config.model.update(positions=16, features=16, heads=2, depth=1)
  config.data.name, config.data.dir = "text", str(tmp_path)
  rng = np.random.default_rng(0)
  for name, count in (("train.txt", 400), ("test.txt", 60)):
    (tmp_path / name).write_text(" ".join(rng.choice(WORDS, count)))
  config.target_bytes, config.rules = 0, RULES
  config.calibrate.images = 0
  config.train.epochs, config.finetune.epochs = 12, 2
  config.train.learning_rate = 2e-2
  config.eval_batch_size = 4
  results = _run(config, tmp_path / "run")
  # Better than the bytes' own frequencies, of which eleven are common.
  assert 1 < results["perplexity_dense"] < 11
  for stage in ("dense", "quantized", "packed"):
    product = results[f"perplexity_{stage}"] * results[f"probability_{stage}"]
    assert product == pytest.approx(1)
  assert results["perplexity_packed"] < results["perplexity_quantized"]
  # Against NumPy.
  network = models.get_model("decoder").make(
    positions=16, features=16, heads=2, depth=1
  )
  packed = pqf_jax.load(str(tmp_path / "run" / "model.safetensors"))
  text = np.frombuffer((tmp_path / "test.txt").read_bytes(), np.uint8)
  count = (len(text) - 1) // 16
  assert results["images"] == count
  inputs = text[: 16 * count].reshape(count, 16).astype(np.int32)
  wanted = text[1 : 16 * count + 1].reshape(count, 16)
  logits = np.asarray(network.apply(packed, inputs), np.float64)
  logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
  nats = -np.take_along_axis(logits, wanted[..., None].astype(int), 2).mean()
  assert results["perplexity_packed"] == pytest.approx(np.exp(nats), rel=1e-4)


def test_a_vision_transformer_is_a_classifier(tmp_path):
  config = vit.get_config()
  config.model.update(features=16, heads=2, depth=1)
  config.target_bytes, config.rules = 0, RULES[1:]
  config.calibrate.images = 0
  config.train.epochs = config.finetune.epochs = 1
  config.train.warmup_epochs = 0.0
  results = _run(config, tmp_path)
  assert results["images"] == 360 and results["ratio"] > 1
  assert results["top1_packed"] > 0.1
  config.data.image_size = 16
  with pytest.raises(errors.InputError, match="16 x 16 pixels, but the ViT"):
    pipeline.run(config, str(tmp_path / "other"))


@pytest.mark.parametrize("recipe", [minilm, lm, vit])
def test_programs_need_no_data(recipe):
  config = recipe.get_config()
  network, template = jobs.build_network(config)
  programs = tasks.get(config.task).abstract_programs(config, network)
  batch = programs.train_batch(4)
  key = jax.random.key(0)
  loss, _ = jax.eval_shape(programs.loss_fn, template, batch, key)
  assert loss.shape == ()
  given = jax.eval_shape(programs.infer, template, programs.eval_batch(4))
  assert given.ndim in (1, 2)


@pytest.mark.parametrize("recipe", [minilm, lm, vit])
def test_a_recipe_has_one_size(recipe):
  assert recipe.get_config() == recipe.get_config("8x")
  assert recipe.get_config("16x").name.endswith("_16x")
  with pytest.raises(ValueError, match="name one of 8x, 16x"):
    recipe.get_config("8x,16x")

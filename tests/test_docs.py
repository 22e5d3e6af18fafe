"""The docs: their Python runs, their commands exist, nothing is stale."""

import importlib.util
import inspect
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

import pqf_jax
from pqf_jax import inference, recipes
from pqf_jax.models import resnet
from pqf_jax.pipeline import settings

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
TEXTS = {path.stem: path.read_text() for path in [*PAGES, ROOT / "README.md"]}


def blocks(page: str) -> list[str]:
  return re.findall(r"```python\n(.*?)```", TEXTS[page], re.S)


def script(name: str):
  """Imports a program of docs/."""
  spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


class Own(nn.Module):
  """A network with the paths that the pages name."""

  @nn.compact
  def __call__(self, images):
    x = nn.relu(nn.Conv(16, (3, 3), name="stem")(images))
    x = nn.relu(nn.Conv(32, (3, 3), name="conv")(x))
    return nn.Dense(64, name="head")(x.mean((1, 2)))


@pytest.fixture(scope="module")
def own():
  """What a reader has: a network, its variables, images."""
  images = jnp.ones((2, 8, 8, 3))
  model = Own()
  variables = model.init(jax.random.key(0), images)
  return {
    "jax": jax,
    "pqf_jax": pqf_jax,
    "model": model,
    "variables": variables,
    "images": images,
  }


@pytest.fixture(scope="module")
def packed(own):
  """The same with compressed variables."""
  rules = [
    pqf_jax.Rule("params/head/kernel", 16, channels=4, kmeans_steps=5),
    pqf_jax.Rule(".*", None),
  ]
  plan = pqf_jax.make_plan(rules, own["variables"])
  compressed, _ = pqf_jax.quantize_params(
    jax.random.key(0), own["variables"], plan
  )
  return own | {"variables": compressed}


def run(page: str, names: dict, numbers: slice = slice(None)) -> dict:
  names = dict(names)
  # As for users, not as strict as for tests.
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    for block in blocks(page)[numbers]:
      exec(block.replace("channels=4)", "channels=4, kmeans_steps=5)"), names)
  return names


def test_a_network_of_ones_own_is_compressed(
  own, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setitem(
    TEXTS, "compress", TEXTS["compress"].replace("channels=2)", "2, 5)")
  )
  names = run("compress", own)
  assert (tmp_path / "model.safetensors").exists()
  assert float(capsys.readouterr().out.split()[1]) > 3
  assert names["gradients"]["params"]["stem"]["kernel"].any()


def test_a_packed_network_is_loaded(own, tmp_path, monkeypatch):
  model = resnet.make(depth=18, num_classes=10)
  images = jnp.ones((1, 32, 32, 3))
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
  monkeypatch.chdir(tmp_path)
  pqf_jax.save("runs/resnet18_digits/model.safetensors", ones)
  names = run("loading", {"images": images}, slice(1))
  assert names["logits"].shape == (1, 10)


def test_an_exported_network_is_called(packed, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  names = run("loading", packed, slice(1, None))
  assert names["logits"].shape == (2, 64)


def test_a_compressed_network_is_applied(packed):
  names = run("inference", packed)
  expected = packed["model"].apply(packed["variables"], packed["images"])
  np.testing.assert_allclose(names["logits"], expected, atol=1e-4)


def test_the_page_of_permutation(own):
  names = run("permutation", {})
  groups = {
    axis.group for row in names["axes"].values() for axis in row if axis
  }
  assert len(groups) == 2 and all(group.accepted for group in names["groups"])


def test_kernels_are_found(own):
  rules = [pqf_jax.Rule(".*", None)]
  names = own | {"apply_fn": own["model"].apply, "sample": own["images"]}
  names = run(
    "kernels", names | {"rules": rules, "network": own["model"].apply}
  )
  assert len(names["kernels"]) == 3 and not names["plan"]
  assert names["apply_fn"](own["variables"], own["images"]).shape == (2, 64)


def test_a_budget_and_a_file_with_small_numbers(
  own, packed, tmp_path, monkeypatch
):
  monkeypatch.setitem(
    TEXTS, "budget", TEXTS["budget"].replace("500_000", "20_000")
  )
  assert len(run("budget", own)["rules"]) == 3
  path = tmp_path / "model.safetensors"
  run("packed_file", packed | {"path": path})
  assert pqf_jax.inspect(path).storage == {
    "codebook": "int8",
    "rest": "float16",
  }


@pytest.mark.slow
def test_the_tutorial(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  names = run("tutorial", {})
  assert names["dense"] > 0.9 and names["packed"] > names["dense"] - 0.03
  assert names["result"].size.ratio > 20


def test_every_page_with_python_is_run():
  # any_network has a test of its own, which needs more libraries.
  tested = {
    "any_network",
    "README",
    "budget",
    "compress",
    "inference",
    "kernels",
    "loading",
  }
  tested |= {"packed_file", "permutation", "tutorial"}
  assert {page for page in TEXTS if blocks(page)} == tested


def test_the_api_is_complete():
  named = re.findall(r"^::: pqf_jax\.(.+)$", TEXTS["api"], re.M)
  public = {*re.findall(r"import \w+ as (\w+)", inspect.getsource(inference))}
  assert sorted(named) == sorted(
    [*pqf_jax.__all__, *(f"inference.{name}" for name in public)]
  )


def test_every_setting_is_on_its_page():
  page = script("write_configuration").page()
  assert page == TEXTS["configuration"], (
    "run python docs/write_configuration.py"
  )
  rows = re.findall(r"^\| `([\w.]+)`<br>`(.+?)` \|", page, re.M)
  shown = {name: value for name, value in rows}
  config = recipe("common").get_config()
  for name, value in settings.flatten(config.to_dict()).items():
    part = name.removeprefix("finetune.").removeprefix("train.")
    if not name.startswith("train."):
      assert shown[part] == repr(value), name


def recipe(name: str):
  spec = importlib.util.spec_from_file_location(
    name, recipes.folder() / f"{name}.py"
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize("page", TEXTS)
def test_commands_name_recipes_and_settings_that_exist(page):
  text = TEXTS[page]
  for name, variant in re.findall(
    r"configs/(\w+)\.py(?::([a-z0-9_]+(?:,[a-z0-9_]+)*))?", text
  ):
    if name != "common" and name != "NAME":
      config = recipe(name).get_config(*filter(None, [variant]))
      assert isinstance(config, ml_collections.ConfigDict)
  known = settings.flatten(recipe("resnet18").get_config().to_dict())
  for name in ("mask_rcnn", "minilm", "lm"):
    known |= settings.flatten(recipe(name).get_config().to_dict())
  for name in re.findall(r"--config\.([a-z][\w.]*)=", text):
    assert name in known, name


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_to_files_and_headings(page):
  folder = ROOT if page == "README" else DOCS
  for link in re.findall(r"\]\(([\w./]+)\)", TEXTS[page]):
    assert (folder / link).exists(), link


def test_pictures_are_those_that_the_code_draws():
  drawing = script("draw_pictures")
  for name, draw in drawing.PICTURES.items():
    stored = (drawing.FOLDER / f"{name}.svg").read_text()
    parts, numbers = (
      [f(r"-?\d+(?:\.\d+)?", text) for text in (stored, draw())]
      for f in (re.split, re.findall)
    )
    assert parts[0] == parts[1], f"run python docs/draw_pictures.py ({name})"
    np.testing.assert_allclose(  # coordinates, which are rounded
      np.array(numbers[0], float), np.array(numbers[1], float), atol=0.11
    )

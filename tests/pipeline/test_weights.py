"""The kinds of weights files, and what is said of those that are none."""

import argparse
import collections
import json
import os
import pathlib
import pickle
import re
import subprocess
import sys
import zipfile

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub import errors as hub_errors

from configs import resnet18, resnet50
from pqf_jax import errors, pack, pipeline
from pqf_jax.core import trees
from pqf_jax.models import authors_files, torch_names
from pqf_jax.pipeline import weights
from pqf_jax.pipeline.weights import torch_files
from tests.pipeline import tiny

ROOT = pathlib.Path(__file__).parents[2]
MODEL = tiny.Tiny(10)
TEMPLATE = jax.eval_shape(
  MODEL.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3))
)


def draw(template):
  """Random variables."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: rng.uniform(0.5, 1, leaf.shape).astype(leaf.dtype), template
  )


VARIABLES = draw(TEMPLATE)
STATE_DICT = torch_names.flax_to_torch(VARIABLES)


def read(path, template=TEMPLATE):
  return weights.read(str(path), "tiny", template, norm_epsilon=1e-3)


def assert_equal(left, right):
  jax.tree.map(np.testing.assert_array_equal, left, right)


def official_state_dict():
  """`Tiny` with its classifier compressed, in the authors' layout."""
  rng = np.random.default_rng(1)
  state_dict = {
    name: array
    for name, array in STATE_DICT.items()
    if "running" not in name and name != "fc.weight"
  }
  return state_dict | {
    "fc.codes_matrix": rng.integers(0, 300, (10, 8)).astype(np.int16),
    "fc.codebook": rng.normal(size=(300, 4)).astype(np.float16),
  }


@pytest.fixture
def torch():
  return pytest.importorskip("torch")


def tensors(torch, state_dict):
  return {name: torch.as_tensor(array) for name, array in state_dict.items()}


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.pth.tar", "a.b.ckpt"])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapper", ["", "state_dict", "model", "net"])
def test_files_of_torch_are_read(torch, tmp_path, name, zipped, wrapper):
  content = collections.OrderedDict(tensors(torch, STATE_DICT))
  # Torch's own counters, and a tensor that learns.
  content["bn0.num_batches_tracked"] = torch.tensor(3)
  content["fc.bias"] = torch.nn.Parameter(content["fc.bias"])
  if wrapper:
    content = {wrapper: content, "epoch": 3, "arch": "tiny"}
  torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
  assert_equal(read(tmp_path / name), VARIABLES)


def test_averages_are_read_before_the_last_weights(torch, tmp_path, capsys):
  last = tensors(torch, STATE_DICT)
  average = {name: tensor + 1 for name, tensor in last.items()}
  for name in ("state_dict_ema", "ema"):
    torch.save({"state_dict": last, name: average}, tmp_path / "w.pth")
    found = torch_names.flax_to_torch(read(tmp_path / "w.pth"))
    for path, tensor in average.items():
      np.testing.assert_array_equal(found[path], tensor.numpy())
    assert f"{name!r} is read, not 'state_dict'" in capsys.readouterr().out


def test_checkpoints_of_reference_scripts_are_read(torch, tmp_path):
  # Torchvision's: a counter among the average, and the script's arguments.
  average = {"n_averaged": np.array(9)}
  average |= {f"module.{name}": x for name, x in STATE_DICT.items()}
  content = {
    "model": tensors(torch, {name: x + 1 for name, x in STATE_DICT.items()}),
    "model_ema": tensors(torch, average),
    "args": argparse.Namespace(lr=0.1, weights=None, milestones=[30, 60]),
  }
  torch.save(content, tmp_path / "w.pth")
  assert_equal(read(tmp_path / "w.pth"), VARIABLES)


def test_of_two_networks_it_is_said_which_is_read(capsys):
  content = {"net": {}, "model": STATE_DICT, "epoch": 3}
  found = torch_files._entries("w.pth", content, np.ndarray)
  assert found == STATE_DICT
  assert "'model' is read, not 'net'" in capsys.readouterr().out


@pytest.mark.parametrize(
  "prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.model."]
)
def test_prefixes_of_all_names_are_taken_off(tmp_path, prefix, capsys):
  state_dict = {f"{prefix}{name}": x for name, x in STATE_DICT.items()}
  safetensors.numpy.save_file(state_dict, tmp_path / "w.safetensors")
  assert_equal(read(tmp_path / "w.safetensors"), VARIABLES)
  said = capsys.readouterr().out
  assert said.count(f"{len(STATE_DICT)} names without") == prefix.count(".")
  state_dict["head.weight"] = np.zeros(3, np.float32)
  safetensors.numpy.save_file(state_dict, tmp_path / "w.safetensors")
  with pytest.raises(errors.InputError, match="12 missing .* 13 extra"):
    read(tmp_path / "w.safetensors")


def test_names_that_a_network_has_itself_are_no_prefix(tmp_path):
  template = {
    collection: {"model": modules} for collection, modules in TEMPLATE.items()
  }
  state_dict = {f"model.{name}": x for name, x in STATE_DICT.items()}
  safetensors.numpy.save_file(state_dict, tmp_path / "w.safetensors")
  found = read(tmp_path / "w.safetensors", template)
  assert_equal(found["params"]["model"], VARIABLES["params"])


def test_types_that_numpy_lacks_are_widened(torch, tmp_path):
  halves = {
    name: tensor.bfloat16()
    for name, tensor in tensors(torch, STATE_DICT).items()
  }
  torch.save(halves, tmp_path / "w.pth")
  found = torch_names.flax_to_torch(read(tmp_path / "w.pth"))
  for name, tensor in halves.items():
    np.testing.assert_array_equal(found[name], tensor.float().numpy())


def test_safetensors_are_read_with_torchs_names_and_packed(tmp_path):
  safetensors.numpy.save_file(STATE_DICT, tmp_path / "torch.safetensors")
  assert_equal(read(tmp_path / "torch.safetensors"), VARIABLES)
  pack.save(tmp_path / "ours.safetensors", VARIABLES, norm_epsilon=1e-3)
  ours = read(tmp_path / "ours.safetensors")
  assert_equal(ours, pack.load(tmp_path / "ours.safetensors"))


def test_the_authors_layout_is_recognised_in_every_kind_of_file(tmp_path):
  state_dict = official_state_dict()
  expected = authors_files.from_authors_layout(
    state_dict, TEMPLATE, norm_epsilon=1e-3
  )
  safetensors.numpy.save_file(state_dict, tmp_path / "w.safetensors")
  assert_equal(read(tmp_path / "w.safetensors"), expected)
  torch = pytest.importorskip("torch")
  torch.save(tensors(torch, state_dict), tmp_path / "w.pth")
  assert_equal(read(tmp_path / "w.pth"), expected)


def test_a_packed_copy_gives_the_same_logits(tmp_path):
  safetensors.numpy.save_file(official_state_dict(), tmp_path / "w.safetensors")
  variables = read(tmp_path / "w.safetensors")
  pack.save(tmp_path / "ours.safetensors", variables, norm_epsilon=1e-3)
  images = np.random.default_rng(2).normal(size=(4, 8, 8, 3))
  logits = [
    MODEL.apply(read(tmp_path / name), jnp.asarray(images, jnp.float32))
    for name in ("w.safetensors", "ours.safetensors")
  ]
  np.testing.assert_array_equal(*logits)


def test_without_torch_its_files_are_refused(monkeypatch, tmp_path):
  (tmp_path / "w.pth").write_bytes(b"PK\x03\x04")
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(errors.InputError, match="pip install torch.*safetensors"):
    read(tmp_path / "w.pth")


class Mark:
  """Makes a folder where it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (self.path,)


def test_a_pickle_that_asks_for_more_than_tensors_runs_nothing(torch, tmp_path):
  torch.save({"fc.bias": Mark(tmp_path / "ran")}, tmp_path / "w.pth")
  with pytest.raises(errors.InputError, match=r"asks for \w+\.mkdir") as caught:
    read(tmp_path / "w.pth")
  assert "weights_only" not in str(caught.value)
  assert not (tmp_path / "ran").exists()
  # The file would have run code where torch was not told to refuse.
  torch.load(tmp_path / "w.pth", weights_only=False)
  assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
  "content",
  [b"", b"hello " * 20, pickle.dumps({"fc.bias": 1}), b"\x80\x02"],
)
def test_what_torch_did_not_save_is_refused(torch, tmp_path, content):
  (tmp_path / "w.pth").write_bytes(content)
  with pytest.raises(errors.InputError, match="not a file that torch.save"):
    read(tmp_path / "w.pth")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_damaged_files_of_torch_are_refused(torch, tmp_path, zipped, kept):
  path = tmp_path / "w.pth"
  torch.save(
    tensors(torch, STATE_DICT), path, _use_new_zipfile_serialization=zipped
  )
  data = path.read_bytes()
  path.write_bytes(data[: int(kept * len(data))])
  with pytest.raises(errors.InputError, match="is damaged or no file of weigh"):
    read(path)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ([1, 2], "holds a value of type list"),
    ({"epoch": 3, "nets": {}}, "'epoch' of type int, 'nets' of type dict"),
    ({"model": {"fc.bias": 1.0}}, "'fc.bias' of type float"),
    ({0: np.ones(2)}, "0 of type Tensor, where a state dict has tensors by"),
  ],
)
def test_what_is_no_state_dict_is_refused(torch, tmp_path, content, message):
  if isinstance(content, dict) and 0 in content:
    content = tensors(torch, content)
  torch.save(content, tmp_path / "w.pth")
  with pytest.raises(errors.InputError, match=message):
    read(tmp_path / "w.pth")


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda t, x: x.to("meta"), "'conv0.weight' is without data, on the"),
    (lambda t, x: t.quantize_per_tensor(x, 0.1, 3, t.quint8), "is quantized"),
    (lambda t, x: t.empty(1).expand(400_000_000), "is larger than its data"),
    (lambda t, x: x.to_sparse(), "is sparse"),
    (lambda t, x: t.complex(x, x), "is complex"),
  ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_plain_are_refused(torch, tmp_path, make, message):
  content = tensors(torch, STATE_DICT)
  content["conv0.weight"] = make(torch, content["conv0.weight"])
  torch.save(content, tmp_path / "w.pth")
  with pytest.raises(errors.InputError, match=message):
    read(tmp_path / "w.pth")


def test_a_file_that_inflates_is_refused_before_it_does(torch, tmp_path):
  state_dict = STATE_DICT | {"fc.bias": np.zeros(1 << 20, np.float32)}
  torch.save(tensors(torch, state_dict), tmp_path / "plain.pth")
  with (
    zipfile.ZipFile(tmp_path / "plain.pth") as plain,
    zipfile.ZipFile(tmp_path / "w.pth", "w", zipfile.ZIP_DEFLATED) as packed,
  ):
    for name in plain.namelist():
      packed.writestr(name, plain.read(name))
  with pytest.raises(errors.InputError, match="w.pth is compressed: its .*,"):
    read(tmp_path / "w.pth")


# In every kind of file, values that no float32 network was trained with.
@pytest.mark.parametrize("kind", ["safetensors", "pth", "official"])
@pytest.mark.parametrize(
  ("name", "change", "message"),
  [
    ("bn0.running_var", lambda x: -x, "1 with negative variances (bn0.runni"),
    ("bn0.bias", lambda x: (x * 99).astype(np.int8), "bn0.bias is int8"),
    ("fc.bias", lambda x: (x * 99).astype(np.uint8), "fc.bias is uint8"),
    ("fc.bias", lambda x: x > 0, "1 of another type than float (fc.bias is b"),
    ("fc.bias", lambda x: x * np.float64(1e300), "1 beyond the range of float"),
  ],
)
def test_values_that_cannot_be_right_are_refused(
  tmp_path, kind, name, change, message
):
  state_dict = official_state_dict() if kind == "official" else STATE_DICT
  if name not in state_dict:
    pytest.skip("the authors' layout has no statistics")
  state_dict = state_dict | {name: change(np.asarray(state_dict[name]))}
  if kind == "pth":
    torch = pytest.importorskip("torch")
    torch.save(tensors(torch, state_dict), tmp_path / f"w.{kind}")
  else:
    kind = "safetensors"
    safetensors.numpy.save_file(state_dict, tmp_path / f"w.{kind}")
  with pytest.raises(errors.InputError, match=re.escape(message)):
    read(tmp_path / f"w.{kind}")


def test_other_paths_are_refused(tmp_path):
  for address in ("http://x/w.safetensors", "file:///w.pth"):
    with pytest.raises(errors.InputError, match="of a kind that is not known"):
      read(address)
  (tmp_path / "w.onnx").touch()
  with pytest.raises(errors.InputError, match="w.onnx is of no known kind"):
    read(tmp_path / "w.onnx")
  (tmp_path / "w.pth").mkdir()
  with pytest.raises(errors.InputError, match="w.pth is a folder"):
    read(tmp_path / "w.pth")
  with pytest.raises(errors.InputError, match="no weights file .*x.safetensor"):
    read(tmp_path / "x.safetensors")


@pytest.mark.parametrize("kind", ["torch", "packed", "official"])
def test_another_architecture_is_said_in_the_same_words(tmp_path, kind):
  path = tmp_path / "w.safetensors"
  if kind == "packed":
    pack.save(path, VARIABLES, norm_epsilon=1e-3)
  else:
    states = {"torch": STATE_DICT, "official": official_state_dict()}
    safetensors.numpy.save_file(states[kind], path)
  leaves = trees.flatten(TEMPLATE)
  leaves["params/fc/bias"] = jax.ShapeDtypeStruct((12,), jnp.float32)
  leaves["params/head/kernel"] = leaves.pop("params/conv0/kernel")
  with pytest.raises(errors.InputError) as caught:
    read(path, trees.nest(leaves))
  message = str(caught.value)
  assert message.startswith(f"{path}: the weights do not fit the model: ")
  assert "1 missing (" in message
  assert "head" in message
  assert "1 extra (" in message
  assert "conv0" in message
  assert "bias is (10,), the model has (12,)" in message


# ---- the hub ----------------------------------------------------------------


@pytest.fixture
def downloads(monkeypatch, tmp_path):
  """The (repository, file) of every download; each gives the same file."""
  calls = []

  def download(repo, file):
    calls.append((repo, file))
    path = tmp_path / os.path.basename(file)
    safetensors.numpy.save_file(STATE_DICT, path)
    return str(path)

  monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
  return calls


@pytest.mark.parametrize(
  ("address", "expected"),
  [
    ("hf://timm/tiny.tv_in1k", ("timm/tiny.tv_in1k", "model.safetensors")),
    ("hf://a/b/c.safetensors", ("a/b", "c.safetensors")),
    ("hf://a/b/c/d.safetensors", ("a/b", "c/d.safetensors")),
  ],
)
def test_addresses_of_the_hub_are_downloaded(downloads, address, expected):
  assert_equal(read(address), VARIABLES)
  assert downloads == [expected]


@pytest.mark.parametrize(
  "address", ["hf://", "hf://timm", "hf://timm/", "hf:///b"]
)
def test_incomplete_addresses_are_refused(downloads, address):
  with pytest.raises(errors.InputError, match="no address of the form hf://"):
    read(address)
  assert not downloads


def test_licenses_that_forbid_commercial_use_are_said_once(downloads, capsys):
  read("hf://timm/resnet50.tv_in1k")
  assert "licensed" not in capsys.readouterr().out
  read("hf://timm/resnet50.fb_ssl_yfcc100m_ft_in1k")
  said = capsys.readouterr().out
  assert said.count("licensed under CC-BY-NC 4.0") == 1


@pytest.mark.parametrize(
  "failure",
  [
    hub_errors.LocalEntryNotFoundError("not cached"),
    hub_errors.OfflineModeIsEnabled("offline"),
    hub_errors.HFValidationError("bad name"),
    ConnectionError("no route"),
  ],
)
def test_what_the_hub_does_not_give_is_named(monkeypatch, failure):
  def fail(repo, file):
    raise failure

  monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
  with pytest.raises(errors.InputError) as caught:
    read("hf://timm/resnet18.tv_in1k")
  message = str(caught.value)
  assert (
    "model.safetensors of https://huggingface.co/timm/resnet18.tv" in message
  )
  assert str(failure) in message
  assert "--config.weights=FILE.safetensors" in message


def test_offline_only_the_cache_is_used(tmp_path):
  snapshot = "models--timm--tiny/snapshots/" + "0" * 40
  folder = tmp_path / "hub" / snapshot
  folder.mkdir(parents=True)
  (folder / "model.safetensors").write_bytes(b"cached")
  references = tmp_path / "hub" / "models--timm--tiny" / "refs"
  references.mkdir()
  (references / "main").write_text("0" * 40)
  code = (
    "from pqf_jax.pipeline.weights import hub\n"
    "print(open(hub.fetch('hf://timm/tiny')).read())\n"
    "hub.fetch('hf://timm/other')\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=ROOT,
    env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.stdout == "cached\n"
  assert "InputError: cannot get model.safetensors of https" in done.stderr


# ---- the authors' files, where they are -------------------------------------


@pytest.mark.parametrize(
  ("recipe", "name", "top1", "top5"),
  [
    (resnet18.get_config("imagenet2012"), "resnet18", 0.62, 0.872),
    (resnet18.get_config("imagenet2012,large"), "resnet18_large", 0.604, 0.846),
    (resnet50.get_config("imagenet2012,large"), "resnet50_large", 0.662, 0.89),
  ],
)
def test_released_files_are_as_accurate_as_in_torch(
  torch, shared_data, tmp_path, recipe, name, top1, top5
):
  recipe.mode = "evaluate"
  recipe.weights = str(shared_data / "pqf_official" / f"{name}.pth")
  recipe.data.dir = str(shared_data / "tfds")
  recipe.eval_batch_size = 125
  pipeline.run(recipe, str(tmp_path))
  found = json.loads((tmp_path / "results.json").read_text())
  assert found["images"] == 500
  # At most one image of 500 apart.
  assert found["top1"] == pytest.approx(top1, abs=0.0021)
  assert found["top5"] == pytest.approx(top5, abs=0.0021)

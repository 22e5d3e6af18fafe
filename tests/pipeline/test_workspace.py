"""The workdir: whose it is, who works in it, and what it holds."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from configs import resnet18
from pqf_jax import data, errors, pack, pipeline
from pqf_jax.models import torch_names
from pqf_jax.pipeline import workspace
from pqf_jax.runtime import files
from tests.pipeline import test_processes, tiny


def _claim(folder, *, inputs=None, **changes):
  config = resnet18.get_config()
  config.update(changes)
  with workspace.Workspace(str(folder), config) as files:
    files.claim(inputs)


def test_a_workdir_belongs_to_one_config(tmp_path):
  _claim(tmp_path)
  _claim(tmp_path)
  with pytest.raises(errors.InputError, match="seed: 0 there, 1 now"):
    _claim(tmp_path, seed=1)


def test_processes_may_find_each_other_in_another_way(tmp_path):
  _claim(tmp_path, distributed="on")
  _claim(tmp_path, distributed="off", distributed_timeout=7)


def test_a_workdir_belongs_to_one_content_of_its_inputs(tmp_path):
  _claim(tmp_path, inputs={"weights": "a", "data": "b"})
  _claim(tmp_path, inputs={"weights": "a", "data": "b"})
  with pytest.raises(
    errors.InputError, match="sha256.data: 'b' there, 'c' now"
  ):
    _claim(tmp_path, inputs={"weights": "a", "data": "c"})
  with pytest.raises(
    errors.InputError, match="sha256.weights: 'a' there, None"
  ):
    _claim(tmp_path, inputs={"data": "b"})


def test_what_needs_no_stages_may_read_another_content(tmp_path):
  _claim(tmp_path)
  _claim(tmp_path)
  assert "sha256" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("content", ["", '{"seed": 0', "[]", "5", "\0"])
def test_a_damaged_config_is_named(tmp_path, content):
  _claim(tmp_path)
  (tmp_path / "config.json").write_text(content)
  with pytest.raises(errors.InputError, match="config.json is damaged"):
    _claim(tmp_path)


def test_a_workdir_in_use_is_refused_and_says_by_whom(tmp_path):
  _claim(tmp_path)
  with (
    files.lock(tmp_path / "lock"),
    pytest.raises(errors.InputError, match=f"in use by process {os.getpid()}"),
  ):
    _claim(tmp_path)
  _claim(tmp_path)


def test_a_run_that_failed_leaves_no_lock(tmp_path):
  config = resnet18.get_config()
  with (
    pytest.raises(ZeroDivisionError) as caught,
    workspace.Workspace(str(tmp_path), config) as failed,
  ):
    failed.claim()
    raise ZeroDivisionError
  assert caught.value.__traceback__  # which still refers to the workspace
  _claim(tmp_path)


@pytest.fixture
def config(config, tmp_path):
  """Seconds of fine-tuning, from weights in a file."""
  config.weights = str(tmp_path / "weights.safetensors")
  config.train.epochs, config.finetune.epochs = 0, 1
  config.rules = (("params/fc/kernel", 16, 4, 10), ("params/.*", None))
  _write_weights(config.weights, 0)
  return config


def _write_weights(path, seed):
  init = tiny.make(num_classes=10).init
  template = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
  rng = np.random.default_rng(seed)  # compiles nothing
  variables = jax.tree.map(
    lambda leaf: rng.uniform(0.5, 1, leaf.shape).astype(leaf.dtype), template
  )
  safetensors.numpy.save_file(torch_names.flax_to_torch(variables), path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  return tmp_path_factory.mktemp("finished")


@pytest.fixture
def finished(config, made, tmp_path):
  """A copy of a finished workdir."""
  if not (made / "results.json").exists():
    pipeline.run(config, str(made))
    stored = json.loads((made / "config.json").read_text())
    del stored["weights"]
    (made / "config.json").write_text(json.dumps(stored))
  folder = tmp_path / "run"
  shutil.copytree(made, folder)
  stored = json.loads((folder / "config.json").read_text())
  stored["weights"] = config.weights  # every test has a path of its own
  (folder / "config.json").write_text(json.dumps(stored))
  return folder


@pytest.mark.parametrize("is_finished", [True, False])
def test_other_weights_under_the_same_name_are_refused(
  config, finished, is_finished
):
  if not is_finished:
    (finished / "results.json").unlink()
  _write_weights(config.weights, 1)
  with pytest.raises(errors.InputError, match="sha256.weights: "):
    pipeline.run(config, str(finished))
  _write_weights(config.weights, 0)
  pipeline.run(config, str(finished))


def test_other_data_under_the_same_name_are_refused(config, tmp_path):
  digits = data.get_dataset("digits", image_size=8)
  records = list(digits.train)
  data.register(
    "other_digits", lambda data_dir, size: digits._replace(train=records)
  )
  config.data.name = "other_digits"
  config.finetune.epochs = 0
  pipeline.run(config, str(tmp_path / "run"))
  records[0] = records[0] | {"image": 255 - records[0]["image"]}
  with pytest.raises(errors.InputError, match="sha256.data: "):
    pipeline.run(config, str(tmp_path / "run"))


def test_a_fingerprint_depends_on_numbers_pixels_and_labels():
  digits = data.get_dataset("digits", image_size=8)
  small = digits._replace(train=digits.train[:9], test=digits.test[:9])
  first, second, *rest = small.test
  others = [
    small._replace(train=small.train[:8]),
    small._replace(test=[second, first, *rest]),
    small._replace(test=[first | {"label": 11}, second, *rest]),
    small._replace(train=small.test, test=small.train),
  ]
  found = [data.fingerprint(each) for each in (small, *others)]
  assert len(set(found)) == 5 and data.fingerprint(small) == found[0]


def _flip_a_bit(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def _change_a_figure(path):
  path.write_text(path.read_text().replace('"file_bytes": ', '"file_bytes": 1'))


DAMAGES = {
  "deleted": ("model.safetensors", os.unlink),
  "bit": ("model.safetensors", _flip_a_bit),
  "empty": ("model.safetensors", lambda path: path.write_bytes(b"")),
  "report": ("report.html", os.unlink),
  "figure": ("results.json", _change_a_figure),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_or_gone_is_made_again(
  config, finished, made, damage, capsys
):
  name, change = DAMAGES[damage]
  change(finished / name)
  pipeline.run(config, str(finished))
  assert "already done" not in capsys.readouterr().out
  packed = [folder / "model.safetensors" for folder in (finished, made)]
  assert packed[0].read_bytes() == packed[1].read_bytes()
  results = [
    json.loads((f / "results.json").read_text()) for f in (finished, made)
  ]
  for name in ("file_bytes", "top1_packed", "top1_dense"):
    assert results[0][name] == results[1][name]
  pipeline.run(config, str(finished))
  assert "already done" in capsys.readouterr().out


def test_another_storage_costs_no_stage(config, finished, made):
  def read(name):
    return json.loads((finished / name).read_text())

  stages = {
    path: path.read_bytes()
    for path in (finished / "checkpoints").glob("*.json")
  }
  metrics = (finished / "metrics.jsonl").read_bytes()
  before = read("results.json")
  config.storage.codebook, config.storage.rest = "int8", "float16"
  pipeline.run(config, str(finished))
  after = read("results.json")
  codebooks = pack.read(finished / "model.safetensors").buffers["~codebooks8"]
  assert codebooks.nbytes < before["payload_bytes"] - after["payload_bytes"]
  assert after["storage"] == {"codebook": "int8", "rest": "float16"}
  assert after["top1_packed"] == pytest.approx(before["top1_packed"], abs=0.02)
  assert stages and (finished / "metrics.jsonl").read_bytes() == metrics
  assert all(path.read_bytes() == stages[path] for path in stages)
  config.storage.codebook, config.storage.rest = "float16", "float32"
  pipeline.run(config, str(finished))
  packed = [folder / "model.safetensors" for folder in (finished, made)]
  assert packed[0].read_bytes() == packed[1].read_bytes()


@pytest.mark.parametrize("content", ["", '{"a": 1}', '{"name": "t', "[]", "5"])
def test_results_that_are_none_are_refused(config, finished, content):
  (finished / "results.json").write_text(content)
  (finished / "model.safetensors").unlink()
  with pytest.raises(errors.InputError, match="results.json") as caught:
    pipeline.run(config, str(finished))
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("is_finished", [True, False])
def test_stages_of_nobody_are_refused(config, finished, is_finished):
  (finished / "config.json").unlink()
  if not is_finished:
    (finished / "results.json").unlink()
  config.seed = 1
  with pytest.raises(errors.InputError, match="permute.*no config.json"):
    pipeline.run(config, str(finished))


@pytest.mark.parametrize("name", ["dense", "permute", "quantize", "finetune"])
@pytest.mark.parametrize("content", ["", "[]"])
def test_a_damaged_record_is_named(config, finished, name, content):
  (finished / "results.json").unlink()
  (finished / f"checkpoints/{name}.json").write_text(content)
  with pytest.raises(errors.InputError, match=f"{name} is damaged") as caught:
    pipeline.run(config, str(finished))
  assert "\n" not in str(caught.value) and "delete" not in str(caught.value)


def test_a_damaged_state_costs_the_steps_since_the_one_before(
  config, finished, made, tmp_path, monkeypatch
):
  saved = []
  checkpoints = tmp_path / "run/checkpoints"
  original = workspace.checkpoint.Checkpoints.save_progress

  def stop_at_the_second(self, *args):
    original(self, *args)
    saved.append(args[1])
    if len(saved) == 2:
      raise KeyboardInterrupt

  for path in ("results.json", "checkpoints/finetune.json"):
    (finished / path).unlink()
  with monkeypatch.context() as patch:
    owner = workspace.checkpoint.Checkpoints
    patch.setattr(owner, "save_progress", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
      pipeline.run(config, str(finished))
  for file in (checkpoints / f"finetune@{saved[1]}").rglob("d/*"):
    _flip_a_bit(file)
  pipeline.run(config, str(finished))
  packed = [folder / "model.safetensors" for folder in (finished, made)]
  assert packed[0].read_bytes() == packed[1].read_bytes()
  log = (finished / "metrics.jsonl").read_text()
  assert log.count("\n") == (made / "metrics.jsonl").read_text().count("\n")


@pytest.mark.slow
def test_the_second_of_two_commands_says_who_was_first(tmp_path):
  codes, told = test_processes._finish(
    [
      *test_processes._start(tmp_path, 1, devices=1, cluster=False),
      *test_processes._start(tmp_path, 1, devices=1, cluster=False),
    ]
  )
  assert sorted(codes) == [0, 2], told
  assert "is in use by process" in told[codes.index(2)]
  log = (tmp_path / "metrics.jsonl").read_text().splitlines()
  places = [
    (record["stage"], record["step"], "top1" in record)
    for record in map(json.loads, log)
  ]
  assert len(places) == len(set(places))


def test_arrays_are_told_apart_by_name_type_shape_and_value():
  arrays = [
    ("a", np.zeros(4, np.float32)),
    ("b", np.zeros(4, np.float32)),
    ("a", np.zeros(4, np.int32)),
    ("a", np.zeros((2, 2), np.float32)),
    ("a", np.array([0, 0, 0, -0.0], np.float32)),
    ("a", jnp.zeros(4, jnp.bfloat16)),
  ]
  assert len({files.digest_arrays([each]) for each in arrays}) == len(arrays)

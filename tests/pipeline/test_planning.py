"""Rules that a job chooses for a number of bytes."""

import json

import pytest

import pqf_jax
from pqf_jax import errors, pipeline
from pqf_jax.pipeline import planning, settings, stages
from tests.pipeline import tiny

TARGET = 4000


def _config():
  config = tiny.get_config()
  config.target_bytes = TARGET
  config.quantize.kmeans_steps = 3
  config.storage.codebook = "int8"
  config.finetune.epochs = 0
  return config


@pytest.fixture(scope="module")
def _made(tmp_path_factory):
  return {"folder": tmp_path_factory.mktemp("budget")}


@pytest.fixture
def folder(_made, monkeypatch):
  """That of a job, which was stopped when it had chosen its rules."""
  folder = _made["folder"]
  if "done" not in _made:
    with monkeypatch.context() as patch:
      patch.setattr(stages, "permute_stage", _never)
      with pytest.raises(AssertionError, match="too late"):
        pipeline.run(_config(), str(folder))
    with monkeypatch.context() as patch:
      patch.setattr(planning, "choose_rules", _never)
      pipeline.run(_config(), str(folder))
    _made["done"] = True
  return folder


def _never(*args, **kwargs):
  raise AssertionError("too late")


def test_the_file_has_the_bytes_and_the_rules(folder):
  found = pqf_jax.inspect(folder / "model.safetensors")
  assert 0.97 * TARGET <= found.payload_bytes <= TARGET
  record = json.loads((folder / "checkpoints" / "plan.json").read_text())
  rules = settings.make_rules(record["rules"])
  assert {rule.kmeans_steps for rule in rules if rule.num_codes} == {3}
  assert {
    rule.pattern: (rule.num_codes, rule.channels)
    for rule in rules
    if rule.num_codes
  } == {
    kernel.size.path: (kernel.size.num_codes, kernel.channels)
    for kernel in found.kernels
  }


def test_a_plan_can_be_had_without_a_job(folder, capsys):
  config = _config()
  config.mode = "plan"
  config.weights = str(folder / "model.safetensors")
  pipeline.run(config, None)
  *_, last = capsys.readouterr().out.splitlines()
  assert 0.97 * TARGET <= int(last.removeprefix("payload_bytes=")) <= TARGET


def test_another_storage_does_not_make_the_file_larger(folder):
  config = _config()
  config.storage.codebook = "float16"
  with pytest.raises(errors.InputError, match="use another --workdir"):
    pipeline.run(config, str(folder))


@pytest.mark.parametrize("target", [100, 10**6])
def test_bytes_that_no_rules_make_are_refused_first(
  target, monkeypatch, tmp_path
):
  config = _config()
  config.target_bytes = target
  monkeypatch.setattr(stages, "dense_stage", _never)
  with pytest.raises(errors.InputError, match=f"the target is {target:,}"):
    pipeline.run(config, str(tmp_path))


def test_a_preflight_has_no_weights_to_choose_by():
  config = _config()
  config.mode = "preflight"
  config.topology = "v5e:2x4"
  with pytest.raises(errors.InputError, match="--config.target_bytes=0"):
    pipeline.run(config, None)

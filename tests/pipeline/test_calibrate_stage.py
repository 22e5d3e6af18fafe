"""The calibration as a stage of a job."""

import json

import jax
import numpy as np
import pytest

from pqf_jax import calibrate, errors, pack, pipeline
from pqf_jax.core import trees
from pqf_jax.pipeline import stages


class Stopped(Exception):
  """Ends a job where it stands."""


@pytest.fixture
def calibrated(config):
  config.calibrate.images = 192
  config.finetune.epochs = 0
  return config


def test_without_training_the_calibrated_network_is_packed(
  calibrated, tmp_path, monkeypatch
):
  # Stopped after the stage, a job goes on with the checkpoint.
  def stop(*arguments):
    raise Stopped

  with monkeypatch.context() as patch:
    patch.setattr(stages, "finetune_stage", stop)
    with pytest.raises(Stopped):
      pipeline.run(calibrated, str(tmp_path))
    patch.undo()
    patch.setattr(calibrate, "calibrate_params", stop)
    pipeline.run(calibrated, str(tmp_path))
  results = json.loads((tmp_path / "results.json").read_text())
  # Most of what quantization cost is back.
  lost = results["top1_dense"] - results["top1_quantized"]
  gap = results["top1_dense"] - results["top1_calibrated"]
  assert lost > 0.1 and gap < lost / 2
  assert results["top1_finetuned"] == results["top1_calibrated"]
  assert results["top1_packed"] == pytest.approx(
    results["top1_calibrated"], abs=0.02
  )
  assert "calibrated" in results["seconds"]
  record = json.loads((tmp_path / "checkpoints/calibrate.json").read_text())
  layers = record["output_error"]
  assert set(layers) == {"params/conv1/kernel", "params/fc/kernel"}
  assert all(layer["after"] < layer["before"] for layer in layers.values())
  assert "calibrated" in (tmp_path / "report.html").read_text()
  pack.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("origin", ["calibrated", "quantized"])
def test_the_fine_tuning_starts_where_the_config_says(
  calibrated, origin, tmp_path, monkeypatch
):
  calibrated.finetune.epochs, calibrated.train.epochs = 1, 1
  calibrated.finetune_from = origin
  made = {}

  def fake_calibration(apply_fn, dense, quantized, batches, **settings):
    made["quantized"] = quantized
    made["calibrated"] = jax.tree.map(lambda leaf: leaf + 1, quantized)
    return made["calibrated"], {}

  def stop(job, dense, start):
    made["start"] = start
    raise Stopped

  monkeypatch.setattr(calibrate, "calibrate_params", fake_calibration)
  monkeypatch.setattr(stages, "finetune_stage", stop)
  with pytest.raises(Stopped):
    pipeline.run(calibrated, str(tmp_path))
  for path, leaf in trees.flatten(made["start"]).items():
    np.testing.assert_array_equal(leaf, trees.flatten(made[origin])[path])


@pytest.mark.parametrize(
  ("name", "value"),
  [("images", -1), ("rounds", -1), ("damping", 0.0), ("damping", float("nan"))],
)
def test_bad_settings_are_refused(config, name, value, tmp_path):
  config.calibrate[name] = value
  with pytest.raises(errors.InputError, match=rf"config.calibrate.{name} is"):
    pipeline.run(config, str(tmp_path / "new"))
  assert not (tmp_path / "new").exists()

"""Benchmarks make the folders of their results, before they measure."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import kmeans, minilm, study
from pqf_jax.core import blocks


def test_a_new_folder_of_pages_is_made(tmp_path, monkeypatch):
  folder = tmp_path / "new/docs"
  monkeypatch.setattr(
    sys, "argv", ["kmeans", "--docs", str(folder), "--shapes"]
  )
  monkeypatch.setattr(kmeans.importlib.util, "find_spec", lambda name: None)
  kmeans.main()
  assert (folder / "kmeans.md").exists()


def test_a_new_folder_of_records_is_made(tmp_path):
  file = tmp_path / "new/docs/runs.json"
  study.Records(file).add({"run": "a"})
  assert json.loads(file.read_text()) == [{"run": "a"}]


def test_peers_round_each_weight_to_its_nearest_value():
  kernel = np.random.default_rng(0).normal(size=(6, 2, 8)).astype(np.float32)
  given, num_bytes = minilm.palette(kernel, 3)
  values = np.unique(given)
  assert (len(values), num_bytes) == (8, 96 * 3 // 8 + 2 * 8)
  nearest = np.abs(kernel[..., None] - values).argmin(-1)
  np.testing.assert_array_equal(values[nearest], given)
  spec = blocks.BlockSpec(2, (0,), (1, 2))
  given, num_bytes = minilm.round_to_nearest(kernel, spec, 4)
  assert num_bytes == 96 // 2 + 2 * 16
  step = np.abs(kernel).max(0) / 7
  assert (np.abs(given - kernel) <= step * 0.501).all()


def test_windows_of_the_running_text_have_no_padding():
  sentences = [[101, *range(i, i + 50), 102] for i in range(1000, 1400, 50)]
  windows = minilm.windows(sentences)
  assert windows.shape == (12, minilm.WINDOW)
  assert (windows[:, 0] == 101).all() and (windows[:, -1] == 102).all()
  np.testing.assert_array_equal(
    windows[:, 1:-1].ravel(), np.arange(1000, 1000 + 12 * 30)
  )


@pytest.mark.slow
def test_a_decoder_that_two_devices_share_goes_through_every_stage():
  done = subprocess.run(
    [
      *(sys.executable, "-m", "benchmarks.decoder"),
      *("--layers", "2", "--features", "64", "--heads", "2"),
      *("--sequences", "2", "--length", "16", "--codes", "16"),
    ],
    env=os.environ
    | {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    },
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  lines = [json.loads(line) for line in done.stdout.splitlines()]
  stages = {line["stage"]: line for line in lines if "stage" in line}
  assert [*stages][-3:] == ["restore", "fine-tune", "pack"]
  assert {"axes_as_of_two_layers": True} in lines
  for stage in ("quantize", "calibrate", "restore", "fine-tune"):
    parts = stages[stage]["parts"]
    assert parts["blocks/up/kernel/codes"] == [1, 2, 1]
    assert parts["blocks/up/kernel/codebook"] == [1, 1, 1]
  for stage in ("create", "permute"):
    assert stages[stage]["held"] < 1.02 * stages[stage]["share"]

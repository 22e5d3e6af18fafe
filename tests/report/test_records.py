"""Records: files written whole or not at all, logs that survive a crash."""

import json

import numpy as np
import pytest

from pqf_jax import errors, report
from pqf_jax.runtime import files


def test_write_json_takes_arrays_and_has_no_nan(tmp_path):
  path = tmp_path / "results.json"
  values = {
    "top1": np.float32(0.5),
    "losses": np.array([1.0, np.nan]),
    "inf": float("inf"),
    "shape": (3, 4),
    "file": tmp_path,
  }
  report.write_json(path, values)

  def refuse(name):
    raise AssertionError(f"{name} is not JSON")

  assert json.loads(path.read_text(), parse_constant=refuse) == {
    "top1": 0.5,
    "losses": [1.0, None],
    "inf": None,
    "shape": [3, 4],
    "file": str(tmp_path),
  }
  assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def record(stage, step):
  return {"stage": stage, "step": step, "loss": 1 / (step + 1)}


def logged(path, records):
  for one in records:
    report.append_metric(path, one)
  return report.read_metrics(path)


def test_a_log_cut_anywhere_keeps_its_whole_lines(tmp_path):
  path = tmp_path / "metrics.jsonl"
  records = [record("train", step) for step in range(4)]
  assert logged(path, records) == records
  whole = path.read_bytes()
  for length in range(len(whole) + 1):
    path.write_bytes(whole[:length])
    kept = records[: whole[:length].count(b"\n")]
    assert report.read_metrics(path) == kept
    report.resume_metrics(path, "train", 9)
    assert logged(path, [record("train", 9)]) == [*kept, record("train", 9)]


def test_a_full_disk_is_named(monkeypatch):
  monkeypatch.setattr(files, "check_regular", lambda path: None)
  with pytest.raises(errors.InputError, match="no space is left for /dev/full"):
    report.append_metric("/dev/full", record("train", 0))


@pytest.mark.parametrize("crashed", range(0, 12, 3))
@pytest.mark.parametrize("resumed", range(0, 12, 4))
@pytest.mark.parametrize("half", ["", '{"stage": "finetune", "st'])
def test_a_resumed_log_is_that_of_an_uninterrupted_run(
  tmp_path, crashed, resumed, half
):
  path = tmp_path / "metrics.jsonl"
  resumed = min(resumed, crashed)
  train = [record("train", step) for step in range(20)]
  finetune = [record("finetune", step) for step in range(12)]
  logged(path, train + finetune[:crashed])
  with path.open("a") as file:
    file.write(half)
  report.resume_metrics(path, "finetune", resumed)
  assert logged(path, finetune[resumed:]) == train + finetune


def test_a_log_that_is_not_there_is_empty(tmp_path):
  path = tmp_path / "metrics.jsonl"
  report.resume_metrics(path, "train", 0)
  assert report.read_metrics(path) == []


@pytest.mark.parametrize(
  "line",
  [
    '{"sta',
    "5",
    "[]",
    "{}",
    "null",
    '{"stage": 1, "step": 0}',
    "\0",
    "[" * 9999,
  ]
  + ['{"stage": "train", "step": "0"}'],
)
def test_a_damaged_line_is_named(tmp_path, line):
  path = tmp_path / "metrics.jsonl"
  good = '{"stage": "train", "step": 0}'
  path.write_text(f"{good}\n{line}\n{good}\n")
  with pytest.raises(errors.InputError, match="line 2 .*remove"):
    report.read_metrics(path)
  with pytest.raises(errors.InputError, match="line 2 .*remove"):
    report.resume_metrics(path, "train", 0)

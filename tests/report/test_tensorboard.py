"""TensorBoard: every number once."""

import sys

import pytest

from pqf_jax import errors, report


def record(stage, step):
  return {"stage": stage, "step": step, "loss": 1 / (step + 1)}


def test_tensorboard_gets_every_number_once_and_by_stage(tmp_path):
  pytest.importorskip("tensorboardX")
  run = [
      record("train", step) | {"epoch": 0.5, "top1": None} for step in range(3)
  ]
  with report.TensorBoardWriter(tmp_path) as curves:
    for one in [*run, record("finetune", 0)]:
      curves.write(one)
  assert events(tmp_path / "train") == [
      ("loss", n, pytest.approx(1 / (n + 1))) for n in range(3)
  ]
  assert events(tmp_path / "finetune") == [("loss", 0, 1.0)]


def events(directory):
  """(name, step, value) of each scalar; a record is length, CRC, data, CRC."""
  event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
  (path,) = directory.iterdir()
  data, found = path.read_bytes(), []
  while data:
    length = int.from_bytes(data[:8], "little")
    event = event_pb2.Event.FromString(data[12 : 12 + length])
    found += [
        (value.tag, event.step, value.simple_value)
        for value in event.summary.value
    ]
    data = data[16 + length :]
  return found


def test_tensorboard_that_is_not_installed_says_so(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  with pytest.raises(errors.InputError, match="pip install tensorboardX"):
    report.TensorBoardWriter(tmp_path)

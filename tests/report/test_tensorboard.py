"""TensorBoard: every number is written once."""

import sys

import pytest

from pqf_jax import errors, report


def record(stage, step):
  return {"stage": stage, "step": step, "loss": 1 / (step + 1)}


def test_a_resumed_stage_hides_what_comes_again(tmp_path):
  pytest.importorskip("tensorboardX")
  writer = report.TensorBoardWriter(tmp_path)
  writer.resume("train", 7)
  writer.write(record("train", 7))
  writer.close()
  starts = [
    event.step
    for event in events(tmp_path / "train")
    if event.HasField("session_log")
  ]
  assert starts == [7]


def test_tensorboard_gets_every_number_once_and_by_stage(tmp_path):
  pytest.importorskip("tensorboardX")
  run = [
    record("train", step) | {"epoch": 0.5, "top1": None, "images": 5}
    for step in range(3)
  ]
  writer = report.TensorBoardWriter(tmp_path)
  for stage in ("train", "finetune"):
    writer.resume(stage, 0)
  for one in [*run, record("finetune", 0)]:
    writer.write(one)
  writer.close()
  assert scalars(tmp_path / "train") == [
    ("loss", n, pytest.approx(1 / (n + 1))) for n in range(3)
  ]
  assert scalars(tmp_path / "finetune") == [("loss", 0, 1.0)]


def events(directory):
  """Returns the events of a run; the file has length, CRC, data, CRC each."""
  event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
  (path,) = directory.iterdir()
  data, read = path.read_bytes(), []
  while data:
    length = int.from_bytes(data[:8], "little")
    read.append(event_pb2.Event.FromString(data[12 : 12 + length]))
    data = data[16 + length :]
  return read


def scalars(directory):
  return [
    (value.tag, event.step, value.simple_value)
    for event in events(directory)
    for value in event.summary.value
  ]


def test_tensorboard_that_is_not_installed_says_so(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  with pytest.raises(errors.InputError, match="pip install tensorboardX"):
    report.TensorBoardWriter(tmp_path)

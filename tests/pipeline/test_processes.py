"""Several processes on this machine, as a pod would have them."""

import contextlib
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np
import pytest

from pqf_jax import pack
from pqf_jax.packing import header
from tests import host_devices

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
TIMEOUT = 240


class _Outcome(NamedTuple):
  permutations: dict[str, list[int]]
  codes: np.ndarray
  packed: bytes
  accuracies: dict[str, float]
  num_images: int


def _start(
  workdir,
  count,
  *settings,
  devices=2,
  cluster=True,
  last=(),
  last_workdir=None,
):
  """Starts `count` processes; `last` settings go to the last one only.

  One process is a cluster too, whose devices exchange as those of several do.
  """
  shared = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(devices),
    # XLA's threads: the order in which convolutions add up gradients depends
    # on their number, by default that of cores or of the process's devices.
    "NPROC": "8",
    "PYTHONPATH": str(ROOT),
  }
  processes = []
  for index, own in enumerate(host_devices.job(count)):
    is_last = index == count - 1
    folder = (is_last and last_workdir) or workdir
    more = [*settings, *(last if is_last else ())]
    command = [sys.executable, "-m", "tests.pipeline.tiny", str(folder), *more]
    processes.append(
      subprocess.Popen(
        command,
        cwd=ROOT,
        env=shared | (own if cluster else {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
      )
    )
  return processes


def _finish(processes, timeout=TIMEOUT):
  told = [process.communicate(timeout=timeout)[0] for process in processes]
  return [process.returncode for process in processes], told


def _run(workdir, count, *settings, **kwargs):
  codes, told = _finish(_start(workdir, count, *settings, **kwargs))
  assert codes == [0] * count, told
  return _outcome(workdir)


def _outcome(workdir):
  permuted = json.loads((workdir / "checkpoints/permute.json").read_text())
  results = json.loads((workdir / "results.json").read_text())
  file = workdir / "model.safetensors"
  return _Outcome(
    permuted["permutations"],
    pack.read(file).buffers[header.CODES],
    file.read_bytes(),
    {name: value for name, value in results.items() if "top1" in name},
    results["images"],
  )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A workdir of one process; all others start from its dense network."""
  folder = tmp_path_factory.mktemp("trained")
  _run(folder, 1, "finetune.epochs=0")
  return folder


def _begin_with(trained, workdir):
  """A workdir in which the network is trained already."""
  source = trained / "checkpoints"
  target = workdir / "checkpoints"
  shutil.copytree(source / "dense", target / "dense")
  shutil.copy(source / "dense.json", target)


@pytest.fixture(scope="module")
def plain(trained, tmp_path_factory):
  """What one process on one device finds, which is no cluster."""
  workdir = tmp_path_factory.mktemp("plain")
  _begin_with(trained, workdir)
  return _run(workdir, 1, devices=1, cluster=False)


@pytest.fixture(scope="module")
def alone(trained, tmp_path_factory):
  """Number of devices -> what one process finds on so many."""

  @functools.cache
  def find(devices):
    workdir = tmp_path_factory.mktemp(f"alone{devices}")
    _begin_with(trained, workdir)
    return _run(workdir, 1, devices=devices)

  return find


def _assert_same(found, expected):
  assert found.permutations == expected.permutations
  np.testing.assert_array_equal(found.codes, expected.codes)
  assert found.accuracies == expected.accuracies
  assert found.packed == expected.packed


def _assert_near(found, expected):
  # One of 360 images may turn.
  difference = (
    found.accuracies["top1_packed"] - expected.accuracies["top1_packed"]
  )
  assert abs(difference) <= 1.5 / 360


@pytest.mark.parametrize("count", [2, 4])
def test_processes_find_what_one_finds_on_as_many_devices(
  trained, plain, alone, tmp_path, count
):
  _begin_with(trained, tmp_path)
  found = _run(tmp_path, count)
  _assert_same(found, alone(2 * count))
  # On another number of devices gradients are rounded otherwise, and from the
  # fine-tuning on that shows; what comes before it is the same on any number.
  assert found.permutations == plain.permutations
  np.testing.assert_array_equal(found.codes, plain.codes)
  for name in ("top1_dense", "top1_quantized"):
    assert found.accuracies[name] == plain.accuracies[name]
  _assert_near(found, plain)
  assert found.num_images == 360


def test_processes_share_the_calibration_of_the_first(trained, tmp_path):
  settings = ("calibrate.images=64", "finetune.epochs=0")
  outcomes = []
  for count in (1, 2):
    _begin_with(trained, tmp_path / str(count))
    outcomes.append(
      _run(tmp_path / str(count), count, *settings, devices=4 // count)
    )
  _assert_same(*outcomes)
  found = outcomes[0].accuracies
  assert found["top1_packed"] == found["top1_calibrated"]
  assert found["top1_calibrated"] > found["top1_quantized"]


def test_a_run_of_four_goes_on_with_one_and_with_two(trained, alone, tmp_path):
  _begin_with(trained, tmp_path / "a")
  processes = _start(tmp_path / "a", 4, "checkpoint_steps=3")
  _kill_when(processes, tmp_path / "a/checkpoints", "finetune@*.json")
  shutil.copytree(tmp_path / "a", tmp_path / "b")
  for name, count in {"a": 1, "b": 2}.items():
    _assert_same(
      _run(tmp_path / name, count, "checkpoint_steps=3", devices=8 // count),
      alone(8),
    )


def test_a_run_of_two_goes_on_with_another_number_of_devices(
  trained, plain, tmp_path
):
  _begin_with(trained, tmp_path)
  processes = _start(tmp_path, 2, "checkpoint_steps=3")
  _kill_when(processes, tmp_path / "checkpoints", "finetune@*.json")
  found = _run(tmp_path, 1, "checkpoint_steps=3", devices=1, cluster=False)
  np.testing.assert_array_equal(found.codes, plain.codes)
  _assert_near(found, plain)


# The file by which a stage is known to have begun, and who is killed in it.
STAGES = {
  "dense": ("checkpoints/train@*.json", 3),
  "permute": ("checkpoints/dense.json", 0),
  "quantize": ("checkpoints/permute.json", 1),
  "calibrate": ("checkpoints/quantize.json", 2),
  "finetune": ("checkpoints/finetune@*.json", 0),
}


def test_one_of_four_is_killed_in_every_stage_and_another_is_stopped(tmp_path):
  settings = ("calibrate.images=64", "checkpoint_steps=3")
  start = functools.partial(_start, tmp_path / "a", 4, *settings, devices=1)
  kept = {}
  for sign, victim in STAGES.values():
    processes = start()
    _wait_for(processes, tmp_path / "a", sign)
    processes[victim].kill()
    # JAX alone would take 100 s.
    codes, told = _finish(processes, timeout=20)
    for index in {*range(4)} - {victim}:
      assert codes[index] not in (0, 2)
      assert f"error: process {victim + 1} of 4 on " in told[index]
    records = (tmp_path / "a/checkpoints").glob("*.json")
    kept |= {p: p.read_bytes() for p in records if "@" not in p.name}
  assert len(kept) == len(STAGES) - 1

  processes = start()
  _wait_for(processes, tmp_path / "a", "checkpoints/finetune@*.json")
  processes[2].send_signal(signal.SIGSTOP)
  time.sleep(30)
  processes[2].send_signal(signal.SIGCONT)
  codes, told = _finish(processes)
  assert codes == [0] * 4, told
  assert kept == {path: path.read_bytes() for path in kept}
  _assert_same(
    _outcome(tmp_path / "a"), _run(tmp_path / "b", 4, *settings, devices=1)
  )


@pytest.fixture
def small_disk(tmp_path):
  """A folder on a disk of its own, of 16 MB."""
  folder = tmp_path / "disk"
  folder.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
  if shutil.which("mount") is None or subprocess.run(mount).returncode:
    pytest.skip("only root can mount a disk")
  yield folder
  subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize(
  "sign", ["checkpoints/permute.json", "checkpoints/finetune@*.json"]
)
def test_a_full_disk_ends_all_and_keeps_what_is_saved(
  trained, alone, small_disk, sign
):
  workdir = small_disk / "run"
  _begin_with(trained, workdir)
  processes = _start(workdir, 2, "checkpoint_steps=3")
  _wait_for(processes, workdir, sign)
  ballast = small_disk / "ballast"
  with contextlib.suppress(OSError), ballast.open("wb", 0) as file:
    while True:
      file.write(bytes(1 << 12))
  codes, told = _finish(processes, timeout=60)
  assert codes == [2, 2], told
  for lines in told:
    assert lines.count("no space is left for") == 1
    assert "Traceback" not in lines
  assert "error: process 1 of 2 on " in told[1]
  ballast.unlink()
  _assert_same(_run(workdir, 2, "checkpoint_steps=3"), alone(4))


def _wait_for(processes, folder, sign):
  deadline = time.monotonic() + TIMEOUT
  while not list(folder.glob(sign)):
    assert time.monotonic() < deadline
    assert all(p.poll() is None for p in processes), _finish(processes)
    time.sleep(0.02)


def _kill_when(processes, folder, sign):
  """SIGKILLs the processes, the last one first, when a file is there."""
  _wait_for(processes, folder, sign)
  for process in reversed(processes):
    process.kill()
  _finish(processes)


@pytest.mark.parametrize("count", [1, 2])
def test_sigterm_saves(trained, tmp_path, count):
  _begin_with(trained, tmp_path)
  # So long that it cannot be done before the signal comes.
  settings = ("finetune.epochs=400", "checkpoint_steps=100000")
  processes = _start(tmp_path, count, *settings)
  deadline = time.monotonic() + TIMEOUT
  metrics = tmp_path / "metrics.jsonl"
  while not metrics.exists():
    assert time.monotonic() < deadline
    time.sleep(0.05)
  start = time.monotonic()
  processes[-1].send_signal(signal.SIGTERM)
  codes, told = _finish(processes)
  assert codes == [143] * count, told
  assert time.monotonic() - start < 30
  saved = (tmp_path / "checkpoints").glob("finetune@*.json")
  step = max(int(path.stem.partition("@")[2]) for path in saved)
  assert f"saved at step {step} of" in told[0]


def test_processes_that_differ_are_refused(tmp_path):
  codes, told = _finish(_start(tmp_path, 2, last=["seed=1"]))
  assert codes == [2, 2]
  assert "started differently" in told[0]
  assert "'seed': 0" in told[0] and "'seed': 1" in told[0]


def test_a_workdir_that_one_host_does_not_see_is_refused(tmp_path):
  codes, told = _finish(
    _start(tmp_path / "here", 2, last_workdir=tmp_path / "there")
  )
  assert codes == [2, 2]
  assert "process(es) 1 do not see" in told[0]


def test_a_batch_that_devices_cannot_share_is_refused(tmp_path):
  codes, told = _finish(_start(tmp_path, 1, devices=3))
  assert codes == [2]
  assert "is 256, which 3 devices" in told[0]
  assert "255 or 258" in told[0]

"""Kills whole jobs at random moments; each must end as an undisturbed one.

    python -m tests.fuzz.kill_jobs --kills 100 --seed 0
    python -m tests.fuzz.kill_jobs --kills 10 --recipe configs/resnet18.py

A chain is one workdir: the same command is started and killed (SIGKILL, which
no program can catch) until once it ends by itself. Then its packed file, its
metrics and its log are compared with those of a run that nobody killed.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
STAGES = ("dense", "permute", "quantize", "finetune")
# Of a job that hangs; by far more than any takes.
TIMEOUT = 3600
# What tells runs apart that are otherwise equal.
OWN = ("command", "date", "seconds", "sha256")


class Outcome(NamedTuple):
  """What two runs of a job must share to the last bit."""

  packed: bytes
  results: dict[str, Any]
  log: list[dict[str, Any]]


def outcome(workdir: pathlib.Path) -> Outcome:
  """Reads what a finished job left."""
  results = json.loads((workdir / "results.json").read_text())
  log = (workdir / "metrics.jsonl").read_text().splitlines()
  return Outcome(
    (workdir / "model.safetensors").read_bytes(),
    {name: value for name, value in results.items() if name not in OWN},
    [
      {k: v for k, v in json.loads(line).items() if k != "images_per_second"}
      for line in log
    ],
  )


def where(workdir: pathlib.Path) -> str:
  """Returns the stage in which a job is, as far as its workdir tells."""
  if not (workdir / "config.json").exists():
    return "start"
  for stage in STAGES:
    if not (workdir / "checkpoints" / f"{stage}.json").exists():
      return stage
  return "done" if (workdir / "results.json").exists() else "pack"


class Jobs:
  """Starts the same job again and again."""

  def __init__(self, folder: pathlib.Path, recipe: str | None):
    """Its runs share their compiled programs, in the folder."""
    self._recipe = recipe
    self._environment = {
      "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
      "JAX_PLATFORMS": "cpu",
    } | os.environ

  def start(self, workdir: pathlib.Path) -> subprocess.Popen[str]:
    """Starts the job, and returns when it has begun to work."""
    name = str(workdir)
    command = (
      ["main.py", f"--config={self._recipe}", f"--workdir={name}"]
      if self._recipe
      else ["-m", "tests.pipeline.tiny", name]
    )
    process = subprocess.Popen(
      [sys.executable, *command],
      cwd=ROOT,
      env=self._environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    assert process.stdout
    process.stdout.readline()  # its first line follows the imports
    return process

  def seconds(self, workdir: pathlib.Path) -> float:
    """Runs it to its end; returns for how long it worked."""
    process = self.start(workdir)
    start = time.monotonic()
    _finish(process)
    return time.monotonic() - start

  def kill_once(self, workdir: pathlib.Path, seconds: float) -> str | None:
    """Kills it after so many seconds of work.

    Returns:
      The stage that was killed; None if the job ended before.
    """
    process = self.start(workdir)
    killer = threading.Timer(seconds, process.send_signal, [signal.SIGKILL])
    killer.start()
    _finish(process, signal.SIGKILL)
    killer.cancel()
    return where(workdir) if process.returncode else None


def kills(
  folder: pathlib.Path, *, count: int, seed: int, recipe: str | None = None
) -> Iterator[str]:
  """Kills so many jobs, chain after chain, and compares how each chain ends.

  Args:
    folder: an empty one.
    count: kills; the last chain then goes on undisturbed.
    seed: of their moments, in seconds since the first line that a job prints.
    recipe: path of one that `main.py` takes; None: the tests' tiny job.

  Yields:
    The stage of each kill.

  Raises:
    AssertionError: a job failed, or its outcome is another.
  """
  moments = random.Random(seed)
  jobs = Jobs(folder, recipe)
  jobs.seconds(folder / "first")
  # Not that of the first, which compiles: the programs are there now.
  undisturbed = folder / "undisturbed"
  longest = jobs.seconds(undisturbed)
  expected = outcome(undisturbed)
  chain = done = 0
  while done < count:
    workdir = folder / f"chain{chain}"
    while done < count:
      stage = jobs.kill_once(workdir, moments.uniform(0, longest))
      if stage is None:
        break
      done += 1
      yield stage
    jobs.seconds(workdir)  # it goes on, or says that all is done
    found = outcome(workdir)
    for name, value, wanted in zip(
      Outcome._fields, found, expected, strict=True
    ):
      assert value == wanted, f"{name} of {workdir} is another"
    shutil.rmtree(workdir)
    chain += 1


def _finish(process: subprocess.Popen[str], *accepted: int) -> None:
  told, _ = process.communicate(timeout=TIMEOUT)
  codes = {0, *(-code for code in accepted)}
  assert process.returncode in codes, f"status {process.returncode}: {told}"


def main() -> None:
  """Kills jobs as the command line says, and counts the kills by stage."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kills", type=int, default=100)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--recipe", help="of main.py; default: the tiny job")
  flags = parser.parse_args()
  stages: collections.Counter[str] = collections.Counter()
  start = time.monotonic()
  folder = pathlib.Path(tempfile.mkdtemp(prefix="pqf_jax_"))
  for stage in kills(
    folder, count=flags.kills, seed=flags.seed, recipe=flags.recipe
  ):
    stages[stage] += 1
    sys.stdout.write(f"{sum(stages.values())}: killed in {stage}\n")
    sys.stdout.flush()
  shutil.rmtree(folder)  # it stays where an outcome is another
  seconds = time.monotonic() - start
  sys.stdout.write(
    f"kills={sum(stages.values())} {dict(stages)} all outcomes are equal; "
    f"{seconds:.0f} s\n"
  )


if __name__ == "__main__":
  main()

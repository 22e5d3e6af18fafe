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
# What a job does one after the other; the middle ones save a checkpoint.
STAGES = (
  *("start", "dense", "permute", "quantize", "calibrate", "finetune", "pack"),
  "done",
)
# Between looks at what a job is doing.
WINK = 0.003
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
  for stage in STAGES[1:-2]:
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
      else ["-m", "tests.pipeline.tiny", name, "calibrate.images=64"]
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

  def seconds(self, workdir: pathlib.Path) -> dict[str, float]:
    """Runs it to its end; returns {stage: how long it took}."""
    process = self.start(workdir)
    seconds = dict.fromkeys(STAGES, 0.0)

    def look() -> None:
      last = time.monotonic()
      while process.poll() is None:
        time.sleep(WINK)
        now = time.monotonic()
        seconds[where(workdir)] += now - last
        last = now

    watcher = threading.Thread(target=look)
    watcher.start()
    _finish(process)
    watcher.join()
    return seconds

  def kill_once(
    self, workdir: pathlib.Path, stage: str, seconds: float
  ) -> str | None:
    """Kills it so many seconds after it came to a stage.

    Returns:
      The stage that was killed; None if the job ended before.
    """
    process = self.start(workdir)

    def kill() -> None:
      while STAGES.index(where(workdir)) < STAGES.index(stage):
        if process.poll() is not None:
          return
        time.sleep(WINK)
      time.sleep(seconds)
      process.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    _finish(process, signal.SIGKILL)
    killer.join()
    return where(workdir) if process.returncode else None


def kills(
  folder: pathlib.Path, *, count: int, seed: int, recipe: str | None = None
) -> Iterator[str]:
  """Kills so many jobs, chain after chain, and compares how each chain ends.

  Args:
    folder: an empty one.
    count: kills; the last chain then goes on undisturbed.
    seed: of their moments: a stage, and a part of the time that it takes.
    recipe: path of one that `main.py` takes; None: the tests' tiny job.

  Yields:
    The stage of each kill.

  Raises:
    AssertionError: a job failed, or its outcome is another.
  """
  draws = random.Random(seed)
  jobs = Jobs(folder, recipe)
  jobs.seconds(folder / "first")
  # Not that of the first, which compiles: the programs are there now.
  undisturbed = folder / "undisturbed"
  longest = jobs.seconds(undisturbed)
  expected = outcome(undisturbed)
  chain = done = 0
  while done < count:
    workdir = folder / f"chain{chain}"
    while done < count and where(workdir) != "done":
      # Not one that is over in this workdir.
      stage = draws.choice(STAGES[STAGES.index(where(workdir)) :])
      part = draws.uniform(0, longest[stage])
      killed = jobs.kill_once(workdir, stage, part)
      if killed is None:
        break
      done += 1
      yield killed
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

"""Records, processes and pages of the benchmarks that run whole jobs."""

import json
import os
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
GENERATED = "<!-- The rest is written by {script}. -->"
Record = dict[str, Any]


class Records:
  """The results so far, in a JSON file; the field 'run' of each is its name."""

  def __init__(self, file: pathlib.Path):
    """Reads the file, if it exists; creates its folder otherwise."""
    self._file = file
    file.parent.mkdir(parents=True, exist_ok=True)
    self.rows = json.loads(file.read_text()) if file.exists() else []

  def __contains__(self, run: str) -> bool:
    return any(record["run"] == run for record in self.rows)

  def add(self, record: Record) -> None:
    """Prints the record and writes all records."""
    print(json.dumps(record), flush=True)
    self.rows = sorted([*self.rows, record], key=lambda row: row["run"])
    self._file.write_text(json.dumps(self.rows, indent=1) + "\n")


class Devices:
  """GPUs that run the jobs, and the cache of compiled programs they share."""

  def __init__(self, numbers: Sequence[str], workdir: pathlib.Path):
    """Takes --devices and --workdir."""
    self._numbers = numbers
    self._cache = (workdir / "compiled").resolve()

  def environment(self, position: int, num_jobs: int) -> dict[str, str]:
    """Returns the variables of a job; GPUs take turns, `num_jobs` on each."""
    return {
      "CUDA_VISIBLE_DEVICES": self._numbers[position % len(self._numbers)],
      "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / num_jobs:.3f}",
      "JAX_COMPILATION_CACHE_DIR": str(self._cache),
    }


def run_main(
  flags: Sequence[str],
  workdir: pathlib.Path,
  environment: Mapping[str, str],
) -> Record:
  """Runs main.py in a process of its own, from where an earlier run stopped.

  Args:
    flags: without --workdir.
    workdir: of the job; its output goes to `log` there.
    environment: variables, besides those of this process.

  Returns:
    The content of results.json.

  Raises:
    RuntimeError: the process failed; with the end of its output.
  """
  results = workdir / "results.json"
  if results.exists():
    return json.loads(results.read_text())
  workdir.mkdir(parents=True, exist_ok=True)
  log = workdir / "log"
  with log.open("a") as output:
    process = subprocess.run(
      [sys.executable, str(ROOT / "main.py"), *flags, f"--workdir={workdir}"],
      cwd=ROOT,
      env=os.environ | environment,
      stdout=output,
      stderr=subprocess.STDOUT,
    )
  if process.returncode:
    raise RuntimeError(
      f"{workdir} ended with {process.returncode}:\n{log.read_text()[-3000:]}"
    )
  return json.loads(results.read_text())


def quantization_error(workdir: pathlib.Path) -> float:
  """Returns the mean over layers of squared error / variance of the weights."""
  stored = json.loads((workdir / "checkpoints/quantize.json").read_text())
  return statistics.mean(stored["distortion"].values() or [0.0])


def write_page(page: pathlib.Path, script: str, lines: Iterable[str]) -> None:
  """Writes the generated part of a page and keeps the prose above it."""
  mark = GENERATED.format(script=script)
  prose = page.read_text().partition(mark)[0] if page.exists() else ""
  page.write_text("\n".join((prose + mark, "", *lines)))


def mean_and_range(values: Sequence[float], digits: int) -> str:
  """Returns mean and range as '2.00 (1.00 to 3.00)'."""
  ends = f"{min(values):.{digits}f} to {max(values):.{digits}f}"
  return f"{statistics.mean(values):.{digits}f} ({ends})"

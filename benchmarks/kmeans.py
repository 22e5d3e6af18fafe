"""Time, memory and quality of k-means by shape, for this library and others.

    python -m benchmarks.kmeans
    python -m benchmarks.kmeans --shapes 262144,9,256 --docs /tmp/try

Measures every method that can run here (benchmarks/kmeans_methods.py) on normal
draws, adds the results to `docs/kmeans.json`, and writes `docs/kmeans.md` and
`docs/kmeans.svg` (if there is matplotlib) from that file. `--shapes` without a
shape measures nothing. With a GPU, methods of the CPU are left out.

- us: a call of several iterations, divided by their number (1,000 for pqf_jax,
  as a job has, 5 to 20 for others): median of --repeats calls and their range.
  For pqf_jax this is a whole `kmeans_of_layers` call: random start, noise,
  empty clusters, error of every step. Compile: the time of the first call less
  the median.
- floor: time over that of D + 3 instructions for each pair on an H100 at 1.755
  GHz, the least that exact float32 can take there without matrix units.
- bytes: peak memory on the GPU; for pqf_jax as compiled.
- codes: share of sub-vectors with another code than the argmin in float64, of a
  codebook of random sub-vectors.
- error: mean squared error over the mean of pqf_jax, mean and range of five
  seeds, with exact codes of the final codebook for all. After 1,000 iterations
  of pqf_jax and 100 of others, which takes pqf_jax less time on a GPU. Only
  pqf_jax and `torch, as the paper` have noise.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import pathlib
import statistics
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import kmeans_methods
from pqf_jax.kmeans import assignment
from pqf_jax.runtime import xla_flags

ROOT = pathlib.Path(__file__).parents[1]
Record = dict[str, Any]

_SHAPES = (
  "262144,9,256",
  "131072,18,256",
  "128000,4,2048",
  "512000,4,1024",
  "16384,9,256",
)
_NUM_SEEDS = 5


def main() -> None:
  """Measures, stores, and writes the page."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--shapes", nargs="*", default=_SHAPES, help="N,D,K ...")
  parser.add_argument(
    "--methods", nargs="+", help="labels; default: all but `pqf_jax, ...`"
  )
  parser.add_argument("--repeats", type=int, default=21)
  parser.add_argument("--docs", type=pathlib.Path, default=ROOT / "docs")
  options = parser.parse_args()

  options.docs.mkdir(parents=True, exist_ok=True)
  store = options.docs / "kmeans.json"
  records = json.loads(store.read_text()) if store.exists() else []
  for shape in options.shapes:
    for method in kmeans_methods.available():
      chosen = options.methods or [m.label for m in kmeans_methods.STANDARD]
      if method.label not in chosen:
        continue
      try:
        new = measure(method, shape, options.repeats)
      except Exception as error:  # a peer failed; the others go on
        print(f"{method.label}, {shape}: {error!r}", flush=True)
        continue
      print(json.dumps(new), flush=True)
      records = [old for old in records if _key(old) != _key(new)] + [new]
      store.write_text(json.dumps(records, indent=1) + "\n")
  (options.docs / "kmeans.md").write_text("\n".join(page(records)) + "\n")
  if importlib.util.find_spec("matplotlib"):
    draw(records, options.docs / "kmeans.svg")


def measure(
  method: kmeans_methods.Method, shape: str, num_repeats: int
) -> Record:
  """Returns the record of one method and shape."""
  vectors, rows, exact_codes = _problem(shape)
  num_codes = len(rows[0])
  memory = _PeakMemory(method, vectors, num_codes)
  fit = method.fit(vectors, rows[0], method.num_steps, 0)
  seconds = [_timed(fit) for _ in range(num_repeats + 1)]
  peak = memory.peak()
  first, *rest = seconds
  wrong = None
  if method.assign:
    codes = np.asarray(method.assign(vectors, vectors[rows[0]]))
    wrong = (codes != exact_codes).mean()
  return {
    "device": jax.devices()[0].device_kind,
    "date": datetime.date.today().isoformat(),
    "versions": _versions("jax", method.package),
    "shape": shape,
    "method": method.label,
    "precision": method.precision,
    "us": [
      round(second / method.num_steps * 1e6, 2)
      for second in (statistics.median(rest), min(rest), max(rest))
    ],
    "compile_s": round(max(first - statistics.median(rest), 0), 2),
    "bytes": peak,
    "wrong_codes": None if wrong is None else float(wrong),
    "errors": [
      _error(method.fit(vectors, rows[seed], method.error_steps, seed), vectors)
      for seed in range(_NUM_SEEDS)
    ],
  }


@functools.cache
def _problem(shape: str) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
  """Returns sub-vectors, each seed's first rows, exact codes of seed 0."""
  count, length, num_codes = (int(text) for text in shape.split(","))
  draws = np.random.default_rng(0).standard_normal((count, length))
  vectors = draws.astype(np.float32)
  rows = [
    np.random.default_rng(seed).choice(count, num_codes, replace=False)
    for seed in range(_NUM_SEEDS)
  ]
  return vectors, rows, kmeans_methods.exact_assign(vectors, vectors[rows[0]])


class _PeakMemory:
  """Peak memory of the GPU since this object was made, for one method."""

  def __init__(
    self, method: kmeans_methods.Method, vectors: np.ndarray, num_codes: int
  ) -> None:
    self._ours = method.package == "pqf_jax"
    self._arguments = vectors, num_codes, method.num_steps
    self._torch = jax.default_backend() == "gpu" and not self._ours
    if self._torch:
      import torch

      torch.cuda.reset_peak_memory_stats()

  def peak(self) -> int | None:
    if self._ours:
      return kmeans_methods.peak_bytes(*self._arguments)
    if self._torch:
      import torch

      return torch.cuda.max_memory_allocated()
    return None


def _timed(fit: kmeans_methods.Fit) -> float:
  start = time.perf_counter()
  fit()
  return time.perf_counter() - start


def _error(fit: kmeans_methods.Fit, vectors: np.ndarray) -> float:
  """Returns the mean squared error of the fitted codebook, exactly assigned."""
  codebook = np.asarray(fit())
  codes = np.asarray(assignment.assign(vectors, codebook))
  residual = vectors.astype(np.float64) - codebook[codes]
  return float(np.square(residual).sum(axis=1).mean())


def _versions(*packages: str) -> str:
  owners = importlib.metadata.packages_distributions()
  names = {owners[p][0] for p in packages if p in owners}
  return ", ".join(
    f"{n} {importlib.metadata.version(n)}" for n in sorted(names)
  )


def _key(record: Record) -> tuple[str, str, str]:
  return record["device"], record["shape"], record["method"]


def page(records: Sequence[Record]) -> Iterable[str]:
  """Yields the lines of `docs/kmeans.md`: a table a device and shape."""
  yield "# K-means: time, memory and quality, by shape"
  yield ""
  yield "`benchmarks/kmeans.py` writes this page from `docs/kmeans.json`; its"
  yield "docstring explains the columns."
  for (device, shape), table in _tables(records).items():
    by_method = {record["method"]: record for record in table}
    base = by_method[kmeans_methods.OURS.label]
    count, length, num_codes = (int(text) for text in shape.split(","))
    floor = kmeans_methods.floor_us(count, length, num_codes)
    yield ""
    yield f"## {device}: N = {count:,}, D = {length}, K = {num_codes:,}"
    yield ""
    yield (
      "| method | distances | us an iteration | over pqf_jax | over the floor |"
      " MB | other codes | error | compile, s | date, versions |"
    )
    yield "|---" * 10 + "|"
    for record in table:
      us, low, high = record["us"]
      cells = [
        record["method"],
        record["precision"],
        f"{us:,.0f} ({low:,.0f} to {high:,.0f})",
        f"{us / base['us'][0]:.1f}",
        f"{us / floor:.1f}" if "NVIDIA" in device else "",
        f"{record['bytes'] / 1e6:,.0f}" if record["bytes"] else "",
        "" if record["wrong_codes"] is None else f"{record['wrong_codes']:.1e}",
        _errors(record["errors"], base["errors"]),
        f"{record['compile_s']:.1f}",
        f"{record['date']}, {record['versions']}",
      ]
      yield "| " + " | ".join(cells) + " |"
  yield ""
  yield "![Microseconds an iteration](kmeans.svg)"


def draw(records: Sequence[Record], path: pathlib.Path) -> None:
  """Draws microseconds an iteration: a panel a device, bars by shape."""
  from matplotlib import pyplot  # only here, and not on every machine

  devices = sorted({record["device"] for record in records})
  figure, axes = pyplot.subplots(
    1, len(devices), figsize=(6.4 * len(devices), 4), squeeze=False
  )
  for panel, device in zip(axes[0], devices, strict=True):
    tables = {s: t for (d, s), t in _tables(records).items() if d == device}
    methods = list(
      dict.fromkeys(r["method"] for t in tables.values() for r in t)
    )
    width = 0.8 / len(methods)
    for place, method in enumerate(methods):
      bars = [
        (x + place * width, record["us"][0])
        for x, table in enumerate(tables.values())
        for record in table
        if record["method"] == method
      ]
      panel.bar(*zip(*bars, strict=True), width, label=method)
    panel.set_yscale("log")
    panel.set_xticks(np.arange(len(tables)) + 0.4 - width / 2, list(tables))
    panel.tick_params(labelsize=7)
    panel.set_title(f"{device}: us an iteration, by N,D,K", fontsize=8)
    panel.grid(axis="y", alpha=0.3)
    panel.legend(fontsize=6)
  figure.tight_layout()
  # No date and no random names inside: the same figures give the same file.
  with pyplot.rc_context({"svg.hashsalt": "kmeans"}):
    figure.savefig(path, metadata={"Date": None})


def _tables(
  records: Sequence[Record],
) -> dict[tuple[str, str], list[Record]]:
  """Returns the records by (device, shape), in the order of the methods."""
  order = [method.label for method in kmeans_methods.METHODS]
  tables: dict[tuple[str, str], list[Record]] = {}
  for record in sorted(records, key=lambda r: order.index(r["method"])):
    tables.setdefault((record["device"], record["shape"]), []).append(record)
  return tables


def _errors(errors: Sequence[float], base: Sequence[float]) -> str:
  ratios = [error / statistics.mean(base) for error in errors]
  return (
    f"{statistics.mean(ratios):.4f} ({min(ratios):.4f} to {max(ratios):.4f})"
  )


if __name__ == "__main__":
  xla_flags.set_defaults()
  main()

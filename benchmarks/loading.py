"""Speed and memory of loading a packed file, on CPUs.

    python -m benchmarks.loading

A file holds 100 MB of codes, those of eight equal kernels with D = 8, and is in
the page cache. Each row is measured in a process of its own, on Linux: the best
of five loads, in bytes of the file; the highest resident set during a load less
that before it, over twice the file and the result; and what two parts of a load
take, the sha256 and the check of all that was read. Prints Markdown.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import pathlib
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np

from benchmarks import memory
from pqf_jax import pack
from pqf_jax.core import blocks, vq_array
from pqf_jax.core import plan as plans
from pqf_jax.packing import header

_NUM_CODES = (256, 300, 512, 2048, 4096)
_CODE_BYTES = 100_000_000
_NUM_KERNELS = 8
_LENGTH = 8
_SUB_VECTORS = 1024  # of an output channel
_REPEATS = 5
_MB = 1e6


def main() -> None:
  """Prints the table."""
  print(f"{os.cpu_count()} cores")
  print("| K | MB | load, MB/s | sha256, ms | check, ms | peak |")
  print("|---|---|---|---|---|---|")
  for num_codes in _NUM_CODES:
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder, "packed")
      for measure in (_save, _load):
        with concurrent.futures.ProcessPoolExecutor(
          1, mp_context=multiprocessing.get_context("spawn")
        ) as pool:
          row = pool.submit(measure, path, num_codes).result()
    print(row, flush=True)


def _save(path: pathlib.Path, num_codes: int) -> None:
  bits_of_channel = _SUB_VECTORS * plans.code_bits(num_codes)
  c_out = 8 * _CODE_BYTES // _NUM_KERNELS // bits_of_channel
  spec = blocks.BlockSpec(_LENGTH)
  draws = np.random.default_rng(0)
  dtype = vq_array.code_dtype(num_codes)

  def make() -> vq_array.VQArray:
    return vq_array.VQArray(
      draws.standard_normal((num_codes, _LENGTH), np.float32),
      draws.integers(0, num_codes, (c_out, _SUB_VECTORS), dtype),
      (_SUB_VECTORS * _LENGTH, c_out),
      spec,
    )

  pack.save(path, {str(i): make() for i in range(_NUM_KERNELS)})


def _load(path: pathlib.Path, num_codes: int) -> str:
  """Returns the row of the table."""
  size = path.stat().st_size
  leaves = []

  def load() -> None:
    leaves[:] = jax.tree.leaves(pack.load(path))

  peak = memory.peak(load)
  limit = 2 * size + sum(leaf.nbytes for leaf in leaves)
  fields, buffers = pack.read(path)
  text = header.canonical(fields)
  seconds = _best(load)
  digest = _best(lambda: header.check_digest(text, fields, buffers))
  check = _best(lambda: header.check(fields, buffers))
  return (
    f"| {num_codes} | {size / _MB:.1f} | {size / _MB / seconds:.0f} |"
    f" {1e3 * digest:.0f} | {1e3 * check:.0f} | {peak / limit:.2f} |"
  )


def _best(call: Callable[[], object]) -> float:
  """Returns the least seconds that a call takes."""
  seconds = []
  for _ in range(_REPEATS):
    start = time.perf_counter()
    call()
    seconds.append(time.perf_counter() - start)
  return min(seconds)


if __name__ == "__main__":
  main()

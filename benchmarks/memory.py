"""Peak memory of quantizing, saving, loading and fine-tuning, on a CPU.

    python -m benchmarks.memory

Each row is measured in a process of its own, on Linux: the highest resident set
size less that before the call, when libraries are loaded, a small call of the
same kind was made, and the input is in memory. Prints Markdown.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import pqf_jax
from pqf_jax import finetune, pack, quantize
from pqf_jax.core import blocks, vq_array
from pqf_jax.core import plan as plans

PyTree = Any

_SMALL = (256, 256)
_LARGE = (4096, 4096)
_NUM_CODES = 256
_MIB = 2**20


def main() -> None:
  """Prints the table."""
  print("| call | of | MiB | peak, MiB | ratio |")
  print("|---|---|---|---|---|")
  for row in (_quantize, _save, _load, _finetune):
    with concurrent.futures.ProcessPoolExecutor(
      1, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
      name, of, size, most = pool.submit(row).result()
    print(
      f"| {name} | {of} | {size / _MIB:.1f} | {most / _MIB:.1f} |"
      f" {most / size:.2f} |",
      flush=True,
    )


_Row = tuple[str, str, int, int]
"""The call, what its size is of, the size and the peak, in bytes."""


def _quantize() -> _Row:
  def make_call(shape: tuple[int, int]) -> Callable[[], object]:
    draws = np.random.default_rng(0).standard_normal(shape, np.float32)
    variables = {"params": {"fc": {"kernel": jnp.asarray(draws)}}}
    rule = plans.Rule(".*", _NUM_CODES, channels=4, kmeans_steps=20)
    plan = plans.make_plan((rule,), variables)
    return lambda: quantize.quantize_params(jax.random.key(0), variables, plan)

  make_call(_SMALL)()
  most = peak(make_call(_LARGE))
  return "quantize, D 4, K 256", "the kernel", 4 * np.prod(_LARGE).item(), most


def _save() -> _Row:
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, "packed")
    pack.save(path, _compressed(_SMALL))
    variables = _compressed(_LARGE)
    most = peak(lambda: pack.save(path, variables))
    return "save", "the file", path.stat().st_size, most


def _load() -> _Row:
  with tempfile.TemporaryDirectory() as folder:
    small, large = (pathlib.Path(folder, name) for name in ("small", "large"))
    pack.save(small, _compressed(_SMALL))
    with concurrent.futures.ProcessPoolExecutor(
      1, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
      pool.submit(_save_large, large).result()
    pack.load(small)
    most = peak(lambda: pack.load(large))
    return "load, with its result", "the file", large.stat().st_size, most


def _save_large(path: pathlib.Path) -> None:
  pack.save(path, _compressed(_LARGE))


def _finetune() -> _Row:
  """Measures steps 101 to 1,100 of a small network."""

  def loss(
    variables: PyTree, batch: PyTree, key: jax.Array
  ) -> tuple[jax.Array, tuple[PyTree, PyTree]]:
    del key
    kernel = variables["params"]["fc"]["kernel"].decode()
    error = jnp.square(batch["x"] @ kernel - batch["y"]).mean()
    return error, ({}, {})

  optimizer = optax.adam(1e-3)
  step = pqf_jax.make_finetune_step(loss, optimizer)
  state = finetune.init_state(_compressed(_SMALL), optimizer)
  draws = np.random.default_rng(0)

  def train(num_steps: int) -> None:
    nonlocal state
    for _ in range(num_steps):
      shape = 64, _SMALL[0]
      batch = {name: draws.standard_normal(shape, np.float32) for name in "xy"}
      state, metrics = step(state, batch)
      float(metrics["loss"])

  train(100)
  most = peak(lambda: train(1000))
  size = 4 * np.prod(_SMALL).item()
  return "fine-tune, 1,000 steps after 100", "the kernel", size, most


def _compressed(shape: tuple[int, int]) -> PyTree:
  spec = blocks.BlockSpec(4)
  c_out, m, length = spec.layout(shape)
  draws = np.random.default_rng(0)
  kernel = vq_array.VQArray(
    jnp.asarray(draws.standard_normal((_NUM_CODES, length), np.float32)),
    jnp.asarray(draws.integers(0, _NUM_CODES, (c_out, m), np.uint8)),
    shape,
    spec,
  )
  return {"params": {"fc": {"kernel": kernel}}}


def peak(call: Callable[[], object]) -> int:
  """Returns the bytes by which the resident set grows at most in a call."""
  # Sets the peak back to the present size.
  pathlib.Path("/proc/self/clear_refs").write_text("5")
  before = _resident_peak()
  call()
  return _resident_peak() - before


def _resident_peak() -> int:
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  kib = next(line for line in lines if line.startswith("VmHWM")).split()[1]
  return int(kib) * 1024


if __name__ == "__main__":
  main()

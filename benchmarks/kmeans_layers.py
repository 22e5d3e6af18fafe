"""Time of k-means over many small layers in one call, next to its floor.

    python -m benchmarks.kmeans_layers
    python -m benchmarks.kmeans_layers --batches 16,16384,9,256 --networks

Table 1: L equal layers of N sub-vectors. flash-kmeans, if it is installed,
takes them as one batch of its own kind. Table 2: layers of a recipe's network,
by (D, K). Small layers have at most 16,384 sub-vectors; their cost is the time
of a call with all layers less that of a call with the others only.

Times are of `kmeans_of_layers`, 1,000 iterations on normal draws (20 of
flash-kmeans), by iteration: medians of --repeats calls. Floor: as in
`benchmarks/kmeans.py`, of an H100. Prints Markdown.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import importlib.util
import statistics
import time
from collections.abc import Sequence

import jax
import numpy as np

from benchmarks import kmeans_methods
from pqf_jax import kmeans
from pqf_jax.core import trees
from pqf_jax.pipeline import job as jobs
from pqf_jax.runtime import xla_flags

_BATCHES = ("16,16384,9,256", "64,4096,9,256", "64,4096,4,256")
_NUM_STEPS = 1000
_SMALL = 16384


def main() -> None:
  """Prints both tables."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument(
    "--batches", nargs="*", default=_BATCHES, help="L,N,D,K ..."
  )
  parser.add_argument(
    "--networks", nargs="*", default=["resnet50"], help="modules of configs/"
  )
  parser.add_argument("--repeats", type=int, default=21)
  options = parser.parse_args()
  print(jax.devices()[0].device_kind)
  print("\n| batch | us an iteration | over the floor | flash-kmeans, us |")
  print("|---|---|---|---|")
  for batch in options.batches:
    num_layers, count, length, num_codes = map(int, batch.split(","))
    counts = [count] * num_layers
    us = _microseconds(counts, length, num_codes, options.repeats)
    over = us / _floor(counts, length, num_codes)
    flash = "-"
    if importlib.util.find_spec("flash_kmeans"):
      flash = f"{_flash(counts, length, num_codes, options.repeats):.0f}"
    name = f"{num_layers} x {count:,}, D = {length}, K = {num_codes:,}"
    print(f"| {name} | {us:.1f} | {over:.1f} | {flash} |", flush=True)
  print("\n| network | layers | us | over the floor |", end="")
  print(" small layers | us of them | over their floor |")
  print("|---" * 7 + "|")
  for network in options.networks:
    for (length, num_codes), counts in _kinds(network).items():
      _print_kind(network, counts, length, num_codes, options.repeats)


def _print_kind(
  network: str, counts: list[int], length: int, num_codes: int, repeats: int
) -> None:
  """Prints a row of table 2."""
  us = _microseconds(counts, length, num_codes, repeats)
  over = us / _floor(counts, length, num_codes)
  cells = [f"{network}, D = {length}, K = {num_codes:,}", len(counts)]
  cells += [f"{us:.1f}", f"{over:.1f}"]
  small = [count for count in counts if count <= _SMALL]
  large = [count for count in counts if count > _SMALL]
  if small and large:
    more = us - _microseconds(large, length, num_codes, repeats)
    over = more / _floor(small, length, num_codes)
    cells += [len(small), f"{more:.1f}", f"{over:.1f}"]
  print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def _kinds(network: str) -> dict[tuple[int, int], list[int]]:
  """Returns {(D, K): N of every layer} of a recipe for ImageNet."""
  config = importlib.import_module(f"configs.{network}").get_config(
    "imagenet2012"
  )
  network, template = jobs.build_network(config)
  shapes = trees.flatten(template)
  kinds = collections.defaultdict(list)
  for path, layer in jobs.make_plan(config, network, template).items():
    c_out, m, length = layer.spec.layout(
      layer.spec.layer_shape(shapes[path].shape)
    )
    kinds[length, layer.num_codes].append(c_out * m)
  return kinds


def _floor(counts: Sequence[int], length: int, num_codes: int) -> float:
  """Returns the least microseconds that an H100 needs."""
  return kmeans_methods.floor_us(sum(counts), length, num_codes)


def _draws(counts: Sequence[int], length: int) -> list[jax.Array]:
  rng = np.random.default_rng(0)
  shapes = [(count, length) for count in counts]
  return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def _microseconds(
  counts: Sequence[int], length: int, num_codes: int, repeats: int
) -> float:
  """Returns microseconds of an iteration of pqf_jax over all layers."""
  layers = [jax.device_put(draw) for draw in _draws(counts, length)]
  keys = jax.random.split(jax.random.key(0), len(layers))

  def fit() -> None:
    jax.block_until_ready(
      kmeans.kmeans_of_layers(
        keys, layers, num_codes=num_codes, num_steps=_NUM_STEPS
      )
    )

  return _median(fit, repeats) / _NUM_STEPS * 1e6


def _flash(
  counts: Sequence[int], length: int, num_codes: int, repeats: int
) -> float:
  """Returns microseconds of an iteration of flash-kmeans on equal layers."""
  num_steps = 20
  layers = np.stack(_draws(counts, length))
  fit = kmeans_methods.flash_batch(layers, np.arange(num_codes), num_steps)
  return _median(fit, repeats) / num_steps * 1e6


def _median(fit: kmeans_methods.Fit, repeats: int) -> float:
  fit()  # compiles
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    fit()
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds)


if __name__ == "__main__":
  xla_flags.set_defaults()
  main()

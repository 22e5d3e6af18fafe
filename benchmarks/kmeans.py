"""Time of one k-means iteration, ours and others', by shape.

    python benchmarks/kmeans.py
    python benchmarks/kmeans.py --shapes 262144,9,256 --steps 200 --repeats 5

Runs on JAX's default device. Ours is a whole `annealed_kmeans` call (random
start, noise, empty clusters, error of every step) divided by --steps. Times are
the best of --repeats calls; compile time is what the first call took beyond
that. Peers run when they can be imported, in float32, from the first K
sub-vectors, without subsampling or early stop:

- scikit-learn: KMeans(algorithm='lloyd'), on the CPU, all cores.
- faiss: Kmeans, on the CPU, all cores.
- torch: addmm, argmin, index_add_, on the GPU if torch has one. Plain k-means.

The published code of PQF (PyTorch, 2 CPU cores) took 1965, 1101 and about
10000 ms per iteration at 262144,9,256, at 131072,18,256 and at 128000,4,2048.
Error is the mean squared error after --steps. Annealing pays from about 100
steps on (benchmarks/kmeans_quality.py).
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from pqf_jax.ops import kmeans, nearest

_SHAPES = ("262144,9,256", "131072,18,256", "128000,4,2048", "16384,9,256")

Run = Callable[[], tuple[float, int]]
"""() -> (error, iterations done), which may be fewer than asked for."""


class Timing(NamedTuple):
  """Seconds per iteration, seconds of the first call beyond that, error."""

  iteration: float
  compilation: float
  error: float


def timed(run: Run, num_repeats: int) -> Timing:
  """Times `run`."""
  seconds, error, done = [], 0.0, 0
  for _ in range(num_repeats + 1):
    start = time.perf_counter()
    error, done = run()
    seconds.append(time.perf_counter() - start)
  best = min(seconds[1:])
  return Timing(best / done, max(seconds[0] - best, 0), error)


def ours(vectors: np.ndarray, num_codes: int, num_steps: int) -> Run:
  """All of `annealed_kmeans`."""
  vectors, key = jax.device_put(vectors), jax.random.key(0)

  def run() -> tuple[float, int]:
    result = kmeans.annealed_kmeans(
      key, vectors, num_codes=num_codes, num_steps=num_steps
    )
    return float(result.distortion[-1]), num_steps

  return run


def our_assignment(vectors: np.ndarray, num_codes: int, num_steps: int) -> Run:
  """Only `assign`, `num_steps` calls."""
  vectors, codebook = jax.device_put((vectors, vectors[:num_codes]))

  def run() -> tuple[float, int]:
    for _ in range(num_steps):
      codes = nearest.assign(vectors, codebook)
    codes.block_until_ready()
    return float("nan"), num_steps

  return run


def sklearn_lloyd(vectors: np.ndarray, num_codes: int, num_steps: int) -> Run:
  """KMeans of scikit-learn, on the CPU."""
  from sklearn import cluster  # optional peer

  def run() -> tuple[float, int]:
    model = cluster.KMeans(
      num_codes,
      init=vectors[:num_codes],
      n_init=1,
      max_iter=num_steps,
      tol=0,
      algorithm="lloyd",
    ).fit(vectors)
    return model.inertia_ / len(vectors), model.n_iter_

  return run


def faiss_lloyd(vectors: np.ndarray, num_codes: int, num_steps: int) -> Run:
  """Kmeans of FAISS on the CPU."""
  import faiss  # optional peer

  def run() -> tuple[float, int]:
    model = faiss.Kmeans(
      vectors.shape[1],
      num_codes,
      niter=num_steps,
      max_points_per_centroid=len(vectors),
      min_points_per_centroid=1,
    )
    model.train(vectors, init_centroids=vectors[:num_codes])
    return float(model.obj[-1]) / len(vectors), num_steps

  return run


def torch_lloyd(vectors: np.ndarray, num_codes: int, num_steps: int) -> Run:
  """The strongest plain PyTorch form: no launch or pass that could be saved."""
  import torch  # optional peer

  device = "cuda" if torch.cuda.is_available() else "cpu"
  data = torch.from_numpy(vectors).to(device)
  ones = torch.ones(len(data), device=device)

  def assigned(codebook: torch.Tensor) -> torch.Tensor:
    norms = codebook.square().sum(1)
    return torch.addmm(norms, data, codebook.T, alpha=-2).argmin(1)

  def run() -> tuple[float, int]:
    codebook = data[:num_codes]
    for _ in range(num_steps):
      codes = assigned(codebook)
      sums = torch.zeros_like(codebook).index_add_(0, codes, data)
      counts = torch.zeros_like(codebook[:, 0]).index_add_(0, codes, ones)
      codebook = sums / counts.clamp(min=1)[:, None]
    error = (data - codebook[assigned(codebook)]).square().sum(1).mean()
    return error.item(), num_steps

  return run


def main() -> None:
  """Prints one table row for every shape and method."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--shapes", nargs="+", default=_SHAPES, help="N,D,K ...")
  parser.add_argument("--steps", type=int, default=20)
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--no-peers", action="store_true")
  options = parser.parse_args()

  methods = {"pqf_jax": ours, "pqf_jax, assignment only": our_assignment}
  peers = {
    "sklearn": sklearn_lloyd,
    "faiss": faiss_lloyd,
    "torch": torch_lloyd,
  }
  for package, method in peers.items():
    if importlib.util.find_spec(package) and not options.no_peers:
      methods[package] = method
  print(
    f"{jax.devices()[0].device_kind}, jax {jax.__version__}, "
    f"T = {options.steps}, best of {options.repeats} calls\n"
  )
  print("| N, D, K | method | ms/iteration | Gpairs/s | compile, s | error |")
  print("|---|---|---|---|---|---|")
  for shape in options.shapes:
    count, length, num_codes = (int(text) for text in shape.split(","))
    draws = np.random.default_rng(0).standard_normal((count, length))
    vectors = draws.astype(np.float32)
    for name, method in methods.items():
      run = method(vectors, num_codes, options.steps)
      timing = timed(run, options.repeats)
      rate = count * num_codes / timing.iteration / 1e9
      print(
        f"| {shape} | {name} | {timing.iteration * 1e3:.3f} | {rate:.2f} |"
        f" {timing.compilation:.2f} | {timing.error:.5g} |",
        flush=True,
      )


if __name__ == "__main__":
  main()

"""Time of one k-means iteration, ours and others', by shape.

    python benchmarks/kmeans.py
    python benchmarks/kmeans.py --shapes 262144,9,256 --steps 200 --repeats 5

Runs on JAX's default device. Ours is a whole `kmeans_of_layers` call (random
start, noise, empty clusters, error of every step) divided by --steps. Times are
the best of --repeats calls; compile time is what the first call took beyond
that. `floor` is time over that of D + 3 instructions for each pair on an H100
at 1.755 GHz, the least that exact float32 can take there. Peers run when they
can be imported, from the first K sub-vectors, without subsampling or early
stop; in float32 unless said:

- scikit-learn: KMeans(algorithm='lloyd'), on the CPU, all cores.
- faiss: Kmeans, on the CPU, all cores.
- torch: addmm, argmin, index_add_, on the GPU if torch has one. Plain k-means.
- torch, paper: the formulas of section 3.3 one by one: |x|^2 + |c|^2 - 2 x c in
  16 chunks, noise on the data, a mean over the sub-vectors of each centroid.
- flash_kmeans (TF32) and fastkmeans (float16), with a GPU.

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

# A second, of one lane, on an H100: 132 processors, 128 lanes, 1.755 GHz.
_INSTRUCTIONS = 132 * 128 * 1.755e9

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
  """All of SR-C but the check for NaN, which copies the data to the host."""
  vectors, keys = (
    jax.device_put(vectors),
    jax.random.split(jax.random.key(0), 1),
  )
  size = kmeans.amplitude(vectors.shape[1])
  schedule = kmeans.annealing_schedule(num_steps, size)

  def run() -> tuple[float, int]:
    results = kmeans.kmeans_of_layers(
      keys, [vectors], schedule, num_codes=num_codes
    )
    return float(results[0].distortion[-1]), num_steps

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


def torch_paper(vectors: np.ndarray, num_codes: int, num_steps: int) -> Run:
  """SR-C as the paper writes it."""
  import torch  # optional peer

  device = "cuda" if torch.cuda.is_available() else "cpu"
  data = torch.from_numpy(vectors).to(device)

  def assigned(codebook: torch.Tensor) -> torch.Tensor:
    codes = []
    for chunk in data.chunk(16):
      norms = chunk.square().sum(1, keepdim=True) + codebook.square().sum(1)
      codes.append((norms - 2 * chunk @ codebook.T).argmin(1))
    return torch.cat(codes)

  def run() -> tuple[float, int]:
    codebook, deviation = data[:num_codes], data.std(0)
    for step in range(1, num_steps + 1):
      codes = assigned(codebook)
      amount = (1 - step / num_steps) ** 0.5
      noisy = data + amount * deviation * torch.randn_like(data)
      index = codes[:, None].expand_as(noisy)
      codebook = torch.zeros_like(codebook).scatter_reduce(
        0, index, noisy, "mean", include_self=False
      )
    error = (data - codebook[assigned(codebook)]).square().sum(1).mean()
    return error.item(), num_steps

  return run


def flash(vectors: np.ndarray, num_codes: int, num_steps: int) -> Run:
  """flash-kmeans, on an NVIDIA GPU."""
  import flash_kmeans  # optional peer
  import torch

  data = torch.from_numpy(vectors).cuda()

  def run() -> tuple[float, int]:
    codes, centroids, *_ = flash_kmeans.batch_kmeans_Euclid(
      data[None],
      num_codes,
      max_iters=num_steps,
      tol=-1.0,
      init_centroids=data[None, :num_codes].clone(),
    )
    error = (data - centroids[0][codes[0].long()]).square().sum(1).mean()
    return error.item(), num_steps

  return run


def fast(vectors: np.ndarray, num_codes: int, num_steps: int) -> Run:
  """Fastkmeans, on an NVIDIA GPU."""
  import fastkmeans  # optional peer

  def run() -> tuple[float, int]:
    model = fastkmeans.FastKMeans(
      vectors.shape[1], num_codes, niter=num_steps, tol=-1.0
    )
    model.train(vectors)
    return float("nan"), num_steps

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
    "sklearn": ("sklearn", sklearn_lloyd),
    "faiss": ("faiss", faiss_lloyd),
    "torch": ("torch", torch_lloyd),
    "torch, paper": ("torch", torch_paper),
  }
  if jax.default_backend() == "gpu":
    peers["flash_kmeans"] = "flash_kmeans", flash
    peers["fastkmeans"] = "fastkmeans", fast
  for name, (package, method) in peers.items():
    if importlib.util.find_spec(package) and not options.no_peers:
      methods[name] = method
  print(
    f"{jax.devices()[0].device_kind}, jax {jax.__version__}, "
    f"T = {options.steps}, best of {options.repeats} calls\n"
  )
  print(
    "| N, D, K | method | ms/iteration | Gpairs/s | floor | compile, s "
    "| error |"
  )
  print("|---|---|---|---|---|---|---|")
  for shape in options.shapes:
    count, length, num_codes = (int(text) for text in shape.split(","))
    draws = np.random.default_rng(0).standard_normal((count, length))
    vectors = draws.astype(np.float32)
    for name, method in methods.items():
      run = method(vectors, num_codes, options.steps)
      timing = timed(run, options.repeats)
      rate = count * num_codes / timing.iteration / 1e9
      floor = count * num_codes * (length + 3) / _INSTRUCTIONS
      print(
        f"| {shape} | {name} | {timing.iteration * 1e3:.3f} | {rate:.2f} |"
        f" {timing.iteration / floor:.1f} | {timing.compilation:.2f} |"
        f" {timing.error:.5g} |",
        flush=True,
      )


if __name__ == "__main__":
  main()

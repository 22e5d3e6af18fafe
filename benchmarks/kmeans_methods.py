"""K-means by this library and by others, behind one interface.

A method fits a codebook from given first centroids in a given number of
iterations, without subsampling or early stop, and assigns sub-vectors to a
codebook as its iterations do. Its data are on the device before the clock
starts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from pqf_jax import kmeans
from pqf_jax.kmeans import assignment, batching, loop
from pqf_jax.numerics import bf16_split

Fit = Callable[[], Any]
"""() -> the codebook, an array that NumPy can read."""


class Method(NamedTuple):
  """An implementation of k-means.

  Attributes:
    label: for the tables.
    package: Python package that must be importable.
    device: 'gpu', 'cpu' or 'any': where it is run.
    precision: of its distances.
    fit: (vectors [N, D], rows of the first centroids [K], steps, seed) -> Fit.
    assign: (vectors, codebook [K, D]) -> codes [N], if it can be called.
    num_steps: iterations of a timed call.
    error_steps: iterations before the error is measured.
  """

  label: str
  package: str
  device: str
  precision: str
  fit: Callable[[np.ndarray, np.ndarray, int, int], Fit]
  assign: Callable[[np.ndarray, np.ndarray], Any] | None = None
  num_steps: int = 20
  error_steps: int = 100


def available() -> list[Method]:
  """Returns the methods that can run in this process."""
  other = "cpu" if jax.default_backend() == "gpu" else "gpu"
  return [
    method
    for method in METHODS
    if method.device != other and importlib.util.find_spec(method.package)
  ]


# Instructions of an H100 in a second: 132 processors, 128 lanes, 1.755 GHz.
_INSTRUCTIONS = 132 * 128 * 1.755e9


def floor_us(count: int, length: int, num_codes: int) -> float:
  """Returns microseconds of D + 3 instructions for each pair on an H100."""
  return count * num_codes * (length + 3) / _INSTRUCTIONS * 1e6


def ours(
  vectors: np.ndarray, rows: np.ndarray, num_steps: int, seed: int
) -> Fit:
  """Runs pqf_jax, without the check for NaN, which copies data to the host.

  It starts from random sub-vectors, as the others do, but draws its own.
  """
  keys = jax.random.split(jax.random.key(seed), 1)
  data = jax.device_put(vectors)

  def fit() -> jax.Array:
    results = kmeans.kmeans_of_layers(
      keys, [data], num_codes=len(rows), num_steps=num_steps
    )
    return results[0].codebook.block_until_ready()

  return fit


def peak_bytes(vectors: np.ndarray, num_codes: int, num_steps: int) -> int:
  """Returns the bytes of arguments, results and temporaries of `ours`."""

  def run(key: jax.Array, data: jax.Array) -> list[kmeans.KMeansResult]:
    return kmeans.kmeans_of_layers(
      key[None], [data], num_codes=num_codes, num_steps=num_steps
    )

  lowered = jax.jit(run).lower(jax.random.key(0), jnp.asarray(vectors))
  used = lowered.compile().memory_analysis()
  return (
    used.argument_size_in_bytes
    + used.output_size_in_bytes
    + used.temp_size_in_bytes
  )


def fewer_products(count: int) -> Callable[..., Fit]:
  """Returns `ours` with the first `count` products of the bf16 split."""

  def method(*arguments: Any) -> Fit:
    loop.run_steps.clear_cache()  # it holds programs with six
    exact = ours(*arguments)

    def fit() -> jax.Array:
      with mock.patch.object(bf16_split, "PAIRS", bf16_split.PAIRS[:count]):
        return exact()

    return fit

  return method


def fewer_products_assign(count: int) -> Callable[..., Any]:
  """Returns the assignment of `fewer_products`."""

  @jax.jit
  def codes(vectors: jax.Array, codebook: jax.Array) -> jax.Array:
    batch = batching.make_batch([vectors])
    columns = batching.split_columns(batch.tiles)
    layers = batch.layout.layers
    return assignment.nearest_centroid(columns, codebook[None], layers)

  def assign(vectors: np.ndarray, codebook: np.ndarray) -> jax.Array:
    with mock.patch.object(bf16_split, "PAIRS", bf16_split.PAIRS[:count]):
      return codes(vectors, codebook).reshape(-1)[: len(vectors)]

  return assign


def sklearn_lloyd(
  vectors: np.ndarray, rows: np.ndarray, num_steps: int, seed: int
) -> Fit:
  """Runs KMeans of scikit-learn, on the CPU."""
  from sklearn import cluster  # optional peer

  model = cluster.KMeans(
    len(rows),
    init=vectors[rows],
    n_init=1,
    max_iter=num_steps,
    tol=0,
    algorithm="lloyd",
  )
  return lambda: model.fit(vectors).cluster_centers_


def faiss_lloyd(
  vectors: np.ndarray, rows: np.ndarray, num_steps: int, seed: int
) -> Fit:
  """Runs Kmeans of FAISS on the CPU."""
  import faiss  # optional peer

  def fit() -> np.ndarray:
    model = faiss.Kmeans(
      vectors.shape[1],
      len(rows),
      niter=num_steps,
      max_points_per_centroid=len(vectors),
      min_points_per_centroid=1,
    )
    model.train(vectors, init_centroids=vectors[rows])
    return model.centroids

  return fit


def _on_device(array: np.ndarray) -> Any:
  import torch  # optional peer

  device = "cuda" if torch.cuda.is_available() else "cpu"
  return torch.from_numpy(np.asarray(array)).to(device)


def _assigned(data: Any, codebook: Any) -> Any:
  import torch

  norms = codebook.square().sum(1)
  return torch.addmm(norms, data, codebook.T, alpha=-2).argmin(1)


def torch_lloyd(
  vectors: np.ndarray, rows: np.ndarray, num_steps: int, seed: int
) -> Fit:
  """Runs the fastest plain PyTorch that we found: no launch can be saved."""
  import torch

  data = _on_device(vectors)
  ones = torch.ones_like(data[:, 0])

  def fit() -> np.ndarray:
    codebook = data[rows]
    for _ in range(num_steps):
      codes = _assigned(data, codebook)
      sums = torch.zeros_like(codebook).index_add_(0, codes, data)
      counts = torch.zeros_like(codebook[:, 0]).index_add_(0, codes, ones)
      codebook = sums / counts.clamp(min=1)[:, None]
    return codebook.cpu().numpy()

  return fit


def torch_paper(
  vectors: np.ndarray, rows: np.ndarray, num_steps: int, seed: int
) -> Fit:
  """Runs SR-C as the paper writes it: 16 chunks, noise on the data, means."""
  import torch

  data = _on_device(vectors)
  deviation = data.std(0)

  def assigned(codebook: torch.Tensor) -> torch.Tensor:
    codes = []
    for chunk in data.chunk(16):
      norms = chunk.square().sum(1, keepdim=True) + codebook.square().sum(1)
      codes.append((norms - 2 * chunk @ codebook.T).argmin(1))
    return torch.cat(codes)

  def fit() -> np.ndarray:
    torch.manual_seed(seed)
    codebook = data[rows]
    for step in range(1, num_steps + 1):
      codes = assigned(codebook)
      amount = (1 - step / num_steps) ** 0.5
      noisy = data + amount * deviation * torch.randn_like(data)
      index = codes[:, None].expand_as(noisy)
      codebook = torch.zeros_like(codebook).scatter_reduce(
        0, index, noisy, "mean", include_self=False
      )
    return codebook.cpu().numpy()

  return fit


def torch_assign(vectors: np.ndarray, codebook: np.ndarray) -> np.ndarray:
  """Assigns like both torch methods."""
  return _assigned(_on_device(vectors), _on_device(codebook)).cpu().numpy()


def flash(
  vectors: np.ndarray, rows: np.ndarray, num_steps: int, seed: int
) -> Fit:
  """Runs flash-kmeans, whose loop waits for the movement of the centroids."""
  fit = flash_batch(vectors[None], rows, num_steps)
  return lambda: fit()[0]


def flash_batch(vectors: np.ndarray, rows: np.ndarray, num_steps: int) -> Fit:
  """Runs flash-kmeans on L equally large layers [L, N, D] in one call."""
  import flash_kmeans  # optional peer

  data = _on_device(vectors)

  def fit() -> np.ndarray:
    _, centroids, _ = flash_kmeans.batch_kmeans_Euclid(
      data,
      len(rows),
      max_iters=num_steps,
      tol=-1.0,
      init_centroids=data[:, rows].clone(),
    )
    return centroids.cpu().numpy()

  return fit


def flash_assign(vectors: np.ndarray, codebook: np.ndarray) -> np.ndarray:
  """Assigns like flash-kmeans."""
  from flash_kmeans import assign_euclid_triton

  data, centroids = _on_device(vectors)[None], _on_device(codebook)[None]
  codes = assign_euclid_triton.euclid_assign_triton(
    data, centroids, data.square().sum(-1)
  )
  return codes[0].cpu().numpy()


def fast(
  vectors: np.ndarray, rows: np.ndarray, num_steps: int, seed: int
) -> Fit:
  """Runs fastkmeans, which draws the first rows and copies the data itself.

  The data are reordered so that it draws the given rows.
  """
  import fastkmeans  # optional peer
  import torch

  torch.manual_seed(seed)
  drawn = torch.randperm(len(vectors))[: len(rows)].numpy()
  order = np.empty(len(vectors), np.int64)
  others = np.setdiff1d(np.arange(len(vectors)), rows, assume_unique=True)
  order[np.setdiff1d(np.arange(len(vectors)), drawn)] = others
  order[drawn] = rows
  reordered = vectors[order]

  def fit() -> np.ndarray:
    model = fastkmeans.FastKMeans(
      vectors.shape[1], len(rows), niter=num_steps, tol=-1.0, seed=seed
    )
    model.train(reordered)
    return model.centroids

  return fit


def fast_assign(vectors: np.ndarray, codebook: np.ndarray) -> np.ndarray:
  """Assigns like fastkmeans when it trains: in float16."""
  import torch
  from fastkmeans import triton_kernels

  data, centroids = _on_device(vectors), _on_device(codebook)
  codes = torch.zeros(len(data), dtype=torch.int64, device=data.device)
  centroids = centroids.half()
  triton_kernels.triton_kmeans(
    data.half(), data.square().sum(1).half(), centroids,
    (centroids**2).sum(dim=1), codes,
  )  # fmt: skip
  return codes.cpu().numpy()


def exact_assign(vectors: np.ndarray, codebook: np.ndarray) -> np.ndarray:
  """Returns the argmin in float64, to compare others with."""
  wide = np.asarray(codebook, np.float64)
  norms = np.square(wide).sum(axis=1)
  return np.concatenate(
    [
      (norms - 2 * part.astype(np.float64) @ wide.T).argmin(axis=1)
      for part in np.array_split(vectors, -(-len(vectors) // 16384))
    ]
  )


OURS = Method(
  "pqf_jax", "pqf_jax", "any", "float32", ours, assignment.assign, 1000, 1000
)
STANDARD = (
  OURS,
  Method("scikit-learn", "sklearn", "cpu", "float32", sklearn_lloyd),
  Method("FAISS", "faiss", "cpu", "float32", faiss_lloyd),
  Method("torch", "torch", "any", "float32", torch_lloyd, torch_assign),
  Method(
    "torch, as the paper", "torch", "any", "float32", torch_paper,
    torch_assign, num_steps=5,
  ),
  Method("flash-kmeans", "flash_kmeans", "gpu", "TF32", flash, flash_assign),
  Method(
    "fastkmeans", "fastkmeans", "gpu", "float16", fast, fast_assign,
    num_steps=10,
  ),
)  # fmt: skip
METHODS = (
  *STANDARD,
  *(
    OURS._replace(
      label=f"pqf_jax, {count} of {len(bf16_split.PAIRS)} products",
      device="gpu",
      precision=precision,
      fit=fewer_products(count),
      assign=fewer_products_assign(count),
    )
    for count, precision in ((3, "2 x bfloat16"), (1, "bfloat16"))
  ),
)

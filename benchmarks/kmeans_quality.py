"""Squared error of k-means on real kernels: the gain of each part of it.

    python -m benchmarks.kmeans_quality --weights FILE.safetensors ...

Every entry is the mean squared error of a sub-vector relative to the authors'
rule at T = 1000 (noise of amplitude 1, an empty cluster's centroid becomes 0,
the data mean), mean and standard deviation over the seeds. Table 1 starts from
the paper's settings and adds those of `annealing.method` one after the other;
table 2 compares rules for empty clusters.

The files hold PyTorch kernels [C_out, C_in, kh, kw] under torch names; layers
that no file has are left out. Takes 10 minutes on an H100, mostly compilation.
"""

from __future__ import annotations

import argparse
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax import lax

from pqf_jax.kmeans import annealing, batching, empty_clusters, kmeans, loop

# Small and large layers of ResNet-18 and MobileNetV2, 'torch name:length of a
# sub-vector'.
_CASES = (
  "layer1.0.conv1.weight:9",
  "layer1.1.conv1.weight:18",
  "layer2.0.downsample.0.weight:4",
  "layer2.0.conv1.weight:9",
  "layer3.0.downsample.0.weight:4",
  "layer3.0.conv1.weight:18",
  "layer4.0.downsample.0.weight:4",
  "layer4.0.conv1.weight:9",
  "features.2.conv.0.0.weight:4",
  "features.5.conv.0.0.weight:4",
  "features.8.conv.1.0.weight:9",
  "features.11.conv.0.0.weight:8",
  "features.14.conv.0.0.weight:4",
  "features.17.conv.2.weight:4",
)


class Method(NamedTuple):
  """A kind of k-means.

  Attributes:
    num_steps: T, Hartigan's steps included.
    changed: (attribute, value) pairs that differ from `annealing.method`.
    empty_rule: rule for empty clusters.
    plus_plus: k-means++ instead of random sub-vectors as a start.
  """

  num_steps: int
  changed: tuple[tuple[str, float], ...] = ()
  empty_rule: empty_clusters.Rule = empty_clusters.split_worst
  plus_plus: bool = False


def to_zero(clusters: empty_clusters.Clusters) -> empty_clusters.Proposal:
  """Moves the centroids of empty clusters to 0: the authors' rule."""
  return empty_clusters.Proposal(
    clusters.means, jnp.maximum(clusters.counts, 1), _no_spread(clusters)
  )


def keep(clusters: empty_clusters.Clusters) -> empty_clusters.Proposal:
  """Keeps the centroids of empty clusters where they are, and adds noise."""
  empty = clusters.counts[:, None] == 0
  return empty_clusters.Proposal(
    jnp.where(empty, clusters.codebook, clusters.means),
    jnp.maximum(clusters.counts, 1),
    _no_spread(clusters),
  )


def split_largest(clusters: empty_clusters.Clusters) -> empty_clusters.Proposal:
  """Places empty clusters next to the clusters with most sub-vectors."""
  return empty_clusters.split(clusters, clusters.counts)


def _no_spread(clusters: empty_clusters.Clusters) -> jax.Array:
  return jnp.zeros_like(clusters.counts[:, None])


@functools.partial(jax.jit, static_argnames="num_codes")
def plus_plus_start(
  key: jax.Array, vectors: jax.Array, *, num_codes: int
) -> jax.Array:
  """Draws K rows by k-means++ (Arthur and Vassilvitskii, 2007)."""

  def choose(
    state: tuple[jax.Array, jax.Array], choice_key: jax.Array
  ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    distances, _ = state
    row = vectors[jax.random.categorical(choice_key, jnp.log(distances))]
    new = jnp.square(vectors - row[None, :]).sum(axis=1)
    return (jnp.minimum(distances, new), row), row

  start = jnp.full(vectors.shape[0], jnp.float32(1e30)), vectors[0]
  _, rows = lax.scan(choose, start, jax.random.split(key, num_codes))
  return rows


def measure(
  vectors: jax.Array, num_codes: int, method: Method, num_seeds: int
) -> np.ndarray:
  """Returns the final squared error of `num_seeds` runs, [num_seeds]."""
  # All seeds in one call.
  count, length = vectors.shape
  batch = batching.make_batch([vectors] * num_seeds)
  keys = jax.random.split(jax.random.key(0), (2, num_seeds))
  start = plus_plus_start if method.plus_plus else random_start
  starts = [start(key, vectors, num_codes=num_codes) for key in keys[0]]
  annealed = annealing.method(count, length, num_codes)
  annealed = annealed._replace(**dict(method.changed))
  num_last = annealed.num_hartigan_steps(method.num_steps)
  num_annealed = method.num_steps - num_last
  shape = num_annealed, num_codes, length
  normals = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys[1]]
  options = loop.Options(
    most_rows=batch.tiles[:, :, 0].size // num_seeds,
    num_hartigan_steps=num_last,
    num_hartigan_tiles=(
      len(batch.tiles) if annealed.assigns_by_hartigan else 0
    ),
    empty_rule=method.empty_rule,
  )
  fitted = loop.fit(
    loop.prepare(batch, options=options),
    jnp.stack(starts),
    annealing.make_schedule(num_annealed, [annealed] * num_seeds),
    jnp.stack(normals, axis=1),
    options=options,
  )
  return np.asarray(fitted.distortion[:, -1])


def random_start(
  key: jax.Array, vectors: jax.Array, *, num_codes: int
) -> jax.Array:
  """Returns a start drawn as by `annealed_kmeans`."""
  return vectors[kmeans.random_rows(key[None], [len(vectors)], num_codes)[0]]


# The paper's settings, in the order in which the table replaces them.
_PAPER = (
  ("amplitude", 1.0),
  ("momentum", 0.0),
  ("ends_by_hartigan", False),
  ("assigns_by_hartigan", False),
)
AUTHORS = Method(1000, _PAPER, to_zero)
TABLES = {
  "the gain of each part": {
    "authors, 1000": AUTHORS,
    "authors, 100": AUTHORS._replace(num_steps=100),
    "+ split_worst": Method(100, _PAPER),
    "+ amplitude": Method(100, _PAPER[1:]),
    "+ momentum": Method(100, _PAPER[2:]),
    "+ Hartigan's last steps": Method(100, _PAPER[3:]),
    "+ Hartigan's rule: 100 steps": Method(100),
    "1000 steps": Method(1000),
    "1000, only split_worst": Method(1000, _PAPER),
    "100, k-means++": Method(100, plus_plus=True),
    "100, no noise": Method(100, (("amplitude", 0.0),)),
  },
  "rules for empty clusters, 100 steps": {
    rule.__name__: Method(100, empty_rule=rule)
    for rule in (to_zero, keep, split_largest, empty_clusters.split_worst)
  },
}


def main() -> None:
  """Measures all cases and prints the tables."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument(
    "--weights", required=True, nargs="+", help=".safetensors files"
  )
  parser.add_argument("--cases", nargs="+", default=_CASES, help="name:D ...")
  parser.add_argument("--seeds", type=int, default=5)
  options = parser.parse_args()
  weights = {}
  for path in options.weights:
    weights |= safetensors.numpy.load_file(path)
  kernels = {}
  for case in options.cases:
    name, _, length = case.rpartition(":")
    if name in weights:
      kernel = weights[name].astype(np.float32).reshape(-1, int(length))
      kernels[name.removesuffix(".weight")] = jnp.asarray(kernel)

  @functools.cache
  def errors(name: str, method: Method) -> np.ndarray:
    return measure(
      kernels[name], _num_codes(kernels[name]), method, options.seeds
    )

  for title, methods in TABLES.items():
    print(f"\n{title}\n\n| layer, N, D, K | " + " | ".join(methods) + " |")
    print("|---" * (len(methods) + 1) + "|")
    means = []
    for name, vectors in kernels.items():
      reference = errors(name, AUTHORS).mean()
      cells = [errors(name, each) / reference for each in methods.values()]
      means.append([cell.mean() for cell in cells])
      texts = [f"{cell.mean():.4f} ± {cell.std():.4f}" for cell in cells]
      shape = ", ".join(map(str, (*vectors.shape, _num_codes(vectors))))
      print(f"| {name}, {shape} | " + " | ".join(texts) + " |", flush=True)
    for name, summary in {"mean": np.mean, "highest": np.max}.items():
      texts = [f"{value:.4f}" for value in summary(means, axis=0)]
      print(f"| {name} | " + " | ".join(texts) + " |")


def _num_codes(vectors: jax.Array) -> int:
  return min(256, 2 ** int(math.log2(len(vectors) / 4)))


if __name__ == "__main__":
  main()

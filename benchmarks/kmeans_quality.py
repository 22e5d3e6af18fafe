"""Squared error of k-means on real kernels, by rule for empty clusters.

    python -m benchmarks.kmeans_quality --weights FILE.safetensors

Prints three tables. Table 1 compares four rules for empty clusters at the first
of --steps. Table 2 compares amplitudes of the noise, the number of steps, the
first centroids (random or k-means++), and no noise at all. Table 3 compares how
the noise falls, (1 - t / T)^p, p = 1/2 being the paper's. Every entry is the
mean squared error of a sub-vector relative to the authors' rule (an empty
cluster's centroid becomes 0, the data mean; amplitude 1), mean and standard
deviation over the seeds.

The file holds PyTorch kernels [C_out, C_in, kh, kw] under torch names. About
5 minutes on 2 cores with the defaults; --steps 100 takes 1.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax import lax

from pqf_jax.ops import kmeans, packing, relaxation, reseeding

# Small and large layers of ResNet-18, 'torch name:length of a sub-vector'.
_CASES = (
  "layer1.0.conv1.weight:9",
  "layer1.1.conv1.weight:18",
  "layer2.0.downsample.0.weight:4",
  "layer2.0.conv1.weight:9",
  "layer3.0.conv1.weight:18",
  "layer4.0.conv1.weight:9",
)

_POWERS = (0.5, 1.0, 1.5)

Rule = relaxation.Rule


def to_zero(clusters: reseeding.Clusters) -> reseeding.Proposal:
  """The authors' rule: the centroid of an empty cluster becomes 0."""
  return reseeding.Proposal(
    clusters.means, jnp.maximum(clusters.counts, 1), _no_spread(clusters)
  )


def keep(clusters: reseeding.Clusters) -> reseeding.Proposal:
  """The centroid of an empty cluster stays where it is (and gets noise)."""
  empty = clusters.counts[:, None] == 0
  return reseeding.Proposal(
    jnp.where(empty, clusters.codebook, clusters.means),
    jnp.maximum(clusters.counts, 1),
    _no_spread(clusters),
  )


def split_largest(clusters: reseeding.Clusters) -> reseeding.Proposal:
  """Empty clusters move next to the clusters with most sub-vectors."""
  return reseeding.split(clusters, clusters.counts)


def _no_spread(clusters: reseeding.Clusters) -> jax.Array:
  return jnp.zeros_like(clusters.counts[:, None])


@functools.partial(jax.jit, static_argnames="num_codes")
def plus_plus_start(
  key: jax.Array, vectors: jax.Array, *, num_codes: int
) -> jax.Array:
  """K-means++ (Arthur and Vassilvitskii, 2007): K rows of `vectors`."""

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
  vectors: jax.Array,
  num_codes: int,
  schedule: np.ndarray,
  rule: Rule,
  start: Callable[..., jax.Array],
  num_seeds: int,
) -> np.ndarray:
  """Returns the final squared error of `num_seeds` runs."""
  # All seeds in one call.
  packed = packing.pack([vectors] * num_seeds)
  keys = jax.random.split(jax.random.key(0), (2, num_seeds))
  starts = [start(key, vectors, num_codes=num_codes) for key in keys[0]]
  shape = len(schedule), num_codes, vectors.shape[1]
  normals = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys[1]]
  fitted = relaxation.fit(
    packed,
    jnp.stack(starts),
    schedule,
    jnp.stack(normals, axis=1),
    options=relaxation.Options(
      packed.blocks[:, :, 0].size // num_seeds, reseed=rule
    ),
  )
  return np.asarray(fitted.distortion[:, -1])


def random_start(
  key: jax.Array, vectors: jax.Array, *, num_codes: int
) -> jax.Array:
  """The start of `annealed_kmeans`."""
  return vectors[kmeans.random_rows(key, len(vectors), num_codes)]


def load_case(
  weights: dict[str, np.ndarray], case: str
) -> tuple[jax.Array, int]:
  """Returns the sub-vectors of one 'name:D' and K = min(256, 2^...(N/4))."""
  name, length = case.rsplit(":", 1)
  vectors = weights[name].astype(np.float32).reshape(-1, int(length))
  num_codes = min(256, 2 ** int(math.log2(len(vectors) / 4)))
  return jnp.asarray(vectors), num_codes


def print_table(
  title: str,
  columns: Sequence[str],
  rows: dict[str, list[np.ndarray]],
  references: dict[str, float],
) -> None:
  """Prints mean and standard deviation relative to each row's reference."""
  print(f"\n{title}\n\n| layer:D | " + " | ".join(columns) + " |")
  print("|---" * (len(columns) + 1) + "|")
  for name, cells in rows.items():
    cells = [cell / references[name] for cell in cells]
    text = [f"{cell.mean():.4f} ± {cell.std():.4f}" for cell in cells]
    print(f"| {name} | " + " | ".join(text) + " |", flush=True)


def main() -> None:
  """Measures all cases and prints the tables."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--weights", required=True, help=".safetensors file")
  parser.add_argument("--cases", nargs="+", default=_CASES, help="name:D ...")
  parser.add_argument("--steps", nargs="+", type=int, default=[100, 300, 1000])
  parser.add_argument("--seeds", type=int, default=4)
  options = parser.parse_args()
  weights = safetensors.numpy.load_file(options.weights)

  rules = [to_zero, keep, split_largest, reseeding.split_worst]
  few, many = options.steps[0], options.steps[-1]
  by_rule, by_steps, by_power, few_errors, many_errors = {}, {}, {}, {}, {}
  for case in options.cases:
    vectors, num_codes = load_case(weights, case)
    run = functools.partial(
      measure, vectors, num_codes, num_seeds=options.seeds
    )
    annealing = kmeans.annealing_schedule
    by_rule[case] = [run(annealing(few), rule, random_start) for rule in rules]
    few_errors[case] = by_rule[case][0].mean()
    many_errors[case] = run(annealing(many), to_zero, random_start).mean()
    split = reseeding.split_worst
    size = kmeans.amplitude(vectors.shape[1])
    by_steps[case] = [
      *(
        run(annealing(steps, size), split, random_start)
        for steps in options.steps
      ),
      run(annealing(few), split, random_start),
      run(annealing(few, size), split, plus_plus_start),
      run(0 * annealing(few), split, random_start),
      run(0 * annealing(few), split, plus_plus_start),
    ]
    by_power[case] = [
      run(size * annealing(few) ** (2 * power), split, random_start)
      for power in _POWERS
    ]

  print_table(
    f"Table 1. Rule for empty clusters, T = {few}, relative to to_zero at"
    f" T = {few}.",
    [rule.__name__ for rule in rules],
    by_rule,
    few_errors,
  )
  print_table(
    f"Table 2. split_worst, relative to to_zero at T = {many}.",
    [
      *(f"T = {steps}" for steps in options.steps),
      f"T = {few}, amplitude 1",
      f"T = {few}, k-means++",
      f"T = {few}, no noise",
      f"T = {few}, no noise, k-means++",
    ],
    by_steps,
    many_errors,
  )
  print_table(
    f"Table 3. split_worst, T = {few}, relative to to_zero at T = {many}.",
    [f"p = {power}" for power in _POWERS],
    by_power,
    many_errors,
  )


if __name__ == "__main__":
  main()

"""Predicts what k-means would lose, from one tree of clusters for every K."""

import numpy as np

from pqf_jax.core import blocks, trees

# Sub-vectors that a tree is grown on: with all those of a large layer it is no
# more exact.
_MOST_VECTORS = 1 << 14
# Steps of 2-means that part a cluster.
_STEPS = 3
# K codewords fit the N sub-vectors that they were chosen on: these lose the
# share 1 - (K / N)^power of what others would lose. K-means fits better than a
# tree, and loses less by exp(-gain) if codes have a bit an entry or more. All
# three are fitted to k-means of a ResNet-18: docs/budget.md.
_TREE_POWER = 1.0
_KMEANS_POWER = 0.6
_KMEANS_GAIN = 0.14
# Of a kernel's variance, against a division by zero.
_LEAST_KEPT = 1e-3


def predict_distortions(
  kernel: trees.Array, spec: blocks.BlockSpec, bits: int
) -> np.ndarray:
  """Returns [bits + 1] relative distortions, with 1, 2, 4, ... codewords.

  They are those of `quantize.LayerSummary`: squared error of k-means over the
  kernel's variance. A tree of clusters, each parted in two by 2-means, gives
  all of them in one pass over a sample of the sub-vectors; k-means loses a
  little less. No more than a quarter as many codewords as sub-vectors are
  predicted well.

  Args:
    kernel: one layer.
    spec: the layout of its sub-vectors.
    bits: log2 of the most codewords.
  """
  vectors = np.asarray(spec.to_blocks(kernel), np.float32)
  vectors = vectors.reshape(-1, vectors.shape[2])
  total = len(vectors)
  if total > _MOST_VECTORS:
    chosen = np.random.default_rng(0).choice(
      total, _MOST_VECTORS, replace=False
    )
    vectors = vectors[chosen]
  largest = np.abs(vectors).max()
  if np.ptp(vectors) == 0:  # k-means loses nothing either
    return np.zeros(bits + 1)
  vectors = vectors / largest  # whose squares float32 can hold
  variance = float(vectors.var())
  code_bits = np.arange(bits + 1)
  num_codes = 2.0**code_bits
  length = vectors.shape[1]
  lost = tree_errors(vectors, bits) / length / variance
  lost *= 1 - np.minimum(num_codes / total, 1) ** _KMEANS_POWER
  lost /= 1 - np.minimum(num_codes / len(vectors), 0.5) ** _TREE_POWER
  lost *= np.exp(-_KMEANS_GAIN * np.minimum(code_bits / length, 1))
  return np.minimum.accumulate(lost)


def noise_to_signal(distortion: np.ndarray) -> np.ndarray:
  """Returns what a relative distortion adds to a layer's outputs.

  Of the variance of a kernel, k-means keeps 1 - d. Norms, biases and codebooks
  that are calibrated or trained give the outputs their variance back, and
  enlarge the error with it, to d / (1 - d).
  """
  kept = np.maximum(1 - distortion, _LEAST_KEPT)
  return (1 - kept) / kept


def tree_errors(vectors: np.ndarray, bits: int) -> np.ndarray:
  """Returns [bits + 1] mean squared errors of trees of 1, 2, 4, ... clusters.

  Args:
    vectors: [N, D].
    bits: levels of the tree.
  """
  errors = np.zeros(bits + 1)
  labels = np.zeros(len(vectors), np.int64)  # in order, none left out
  for level in range(bits + 1):
    starts = np.flatnonzero(np.diff(labels, prepend=-1))
    counts = np.diff(starts, append=len(vectors))
    means = np.add.reduceat(vectors, starts) / counts[:, None]
    rest = vectors - means[labels]
    errors[level] = np.square(rest).sum(dtype=np.float64) / len(vectors)
    if level < bits:
      halves = 2 * labels + _part(rest, labels, starts, counts)
      order = np.argsort(halves, kind="stable")
      vectors = vectors[order]
      labels = np.cumsum(np.diff(halves[order], prepend=0) > 0)
      labels -= labels[0]
  return errors


def _part(
  rest: np.ndarray, labels: np.ndarray, starts: np.ndarray, counts: np.ndarray
) -> np.ndarray:
  """Returns which half of its cluster each vector is in, [N] bool, by 2-means.

  Args:
    rest: [N, D] vectors less the mean of their cluster.
    labels: [N] clusters, in order.
    starts: where each begins.
    counts: of its vectors.
  """
  widest = np.add.reduceat(np.square(rest), starts).argmax(1)
  halves = rest[np.arange(len(rest)), widest[labels]] > 0
  for _ in range(_STEPS):
    # The other half's sum is the opposite of this.
    sums = np.add.reduceat(rest * halves[:, None], starts)
    ones = np.maximum(np.add.reduceat(halves, starts, dtype=np.int64), 1)
    zeros = np.maximum(counts - ones, 1)
    middle = np.square(sums).sum(1) * (1 / ones - 1 / zeros) / 2
    halves = np.einsum("nd,nd->n", rest, sums[labels]) > middle[labels]
  return halves

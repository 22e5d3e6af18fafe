"""The schedule of SR-C: how much noise and momentum in which step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np


class Schedule(NamedTuple):
  """What the steps of k-means do besides moving centroids to their means.

  Attributes:
    noise: [T, L] float32, a_t of each layer (`pqf_jax.ops.kmeans`).
    momentum: [T] float32 powers of two, so that products with it are exact: a
      centroid goes so much further than the mean, by the way to it and by the
      move before.
  """

  noise: jax.Array
  momentum: jax.Array


def num_transfers(num_steps: int) -> int:
  """How many of the steps are transfers: the last tenth, at most 20.

  They find what they can in 10 to 20 steps, where clusters are small.
  """
  return min(20, num_steps // 10)


def make_schedule(
  num_steps: int, amplitudes: Sequence[float], momentum: float
) -> Schedule:
  """Returns a_t = a * sqrt(1 - t / T) for t = 1..T, made on the host.

  Inside `jit` rounding makes `1 - t / T` negative at t = T for some T (10 and
  1000 among them), and its root NaN.

  Args:
    num_steps: T.
    amplitudes: a of each layer.
    momentum: of all steps but the last, a power of two or 0.
  """
  steps = np.arange(1, num_steps + 1, dtype=np.float64)
  falling = np.sqrt(1 - steps / max(1, num_steps))[:, None]
  return Schedule(
    (falling * np.asarray(amplitudes)[None]).astype(np.float32),
    (momentum * (steps < num_steps)).astype(np.float32),
  )


def amplitude(count: int, length: int, num_codes: int) -> float:
  """The amplitude of the noise, a, which is 1 in the paper.

  Noise has to be of the size of a cell, to move sub-vectors from one to
  another. The cells of short sub-vectors are small compared with the data, and
  the mean of many moves less (the root of n_j). Of exponents 0, 1/4, 0.35 and
  1/2, with factors 0.5 to 2, this was best on average.

  Args:
    count: N.
    length: D.
    num_codes: K.
  """
  return min(1.0, length / 8) * (count / num_codes / 32) ** 0.25

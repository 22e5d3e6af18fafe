"""How a layer is annealed: how much noise and momentum, in which step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

OWN_WEIGHT = 0.5
"""`weight` of the transfers by which steps assign: many move at once, with 1 it
is too many."""


class Method(NamedTuple):
  """How one layer is annealed; see `pqf_jax.kmeans.kmeans`.

  Attributes:
    amplitude: of the noise, a.
    momentum: a multiple of 1/4 below 1, so that products with it can be exact:
      a centroid goes so much further than the mean, by the way to it and by the
      move before.
    weighs_own: whether steps assign by transfers of `OWN_WEIGHT` instead of to
      the nearest centroid.
    ends_in_transfers: whether the last tenth of the steps are transfers.
  """

  amplitude: float
  momentum: float
  weighs_own: bool
  ends_in_transfers: bool = True

  def num_transfers(self, num_steps: int) -> int:
    """How many of the steps are transfers: the last tenth, at most 20.

    They find what they can in 10 to 20 steps, where clusters are small.
    """
    return min(20, num_steps // 10) if self.ends_in_transfers else 0


LLOYD = Method(0.0, 0.0, weighs_own=False, ends_in_transfers=False)
"""Plain k-means."""


def method(count: int, length: int, num_codes: int) -> Method:
  """What is best for N sub-vectors of length D and K centroids.

  - Noise has to be of the size of a cell, to move sub-vectors from one to
    another. The cells of short sub-vectors are small compared with the data,
    and the mean of many moves less (the root of n_j). The paper has 1.
  - Large clusters move slowly and straight on; small ones would overshoot.
  - Where clusters are large, assigning by transfers comes to the nearest
    centroid, which costs a third to a half.

  Measured on 14 layers (docs/kmeans_quality.md).

  Args:
    count: N.
    length: D.
    num_codes: K.
  """
  per_code = count / num_codes
  return Method(
    amplitude=min(1.0, length**0.5 / 4) * (per_code / 32) ** 0.45,
    momentum=0.75 if per_code >= 100 else 0.5,
    weighs_own=per_code < 48,
  )


class Schedule(NamedTuple):
  """What the steps of k-means do besides moving centroids to their means.

  Attributes:
    noise: [T, L] float32, a_t of each layer.
    momentum: [T, L] float32.
  """

  noise: jax.Array
  momentum: jax.Array


def make_schedule(num_steps: int, methods: Sequence[Method]) -> Schedule:
  """Returns a_t = a * sqrt(1 - t / T) for t = 1..T, made on the host.

  Inside `jit` rounding makes `1 - t / T` negative at t = T for some T (10 and
  1000 among them), and its root NaN. The last step has no momentum.

  Args:
    num_steps: T.
    methods: of each layer.
  """
  steps = np.arange(1, num_steps + 1, dtype=np.float64)[:, None]
  falling = np.sqrt(1 - steps / max(1, num_steps))
  amplitudes = np.array([[each.amplitude for each in methods]])
  momenta = np.array([[each.momentum for each in methods]])
  return Schedule(
    (falling * amplitudes).astype(np.float32),
    ((steps < num_steps) * momenta).astype(np.float32),
  )

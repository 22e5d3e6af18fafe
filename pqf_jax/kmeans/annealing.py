"""Noise, momentum and rule of assignment of every step, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

HARTIGAN_WEIGHT = 0.5
"""Weight of a sub-vector in its own cluster in steps that assign by Hartigan's
rule. Many move at once in such a step, and 1 would be too many."""


class Method(NamedTuple):
  """The settings that anneal one layer; see `pqf_jax.kmeans.kmeans`.

  Attributes:
    amplitude: of the noise, a.
    momentum: how much further than the mean a centroid goes, as a share of the
      way to the mean and of the move before. A multiple of 1/4 below 1, so that
      products with it can be exact.
    assigns_by_hartigan: whether steps assign by Hartigan's rule, with
      `HARTIGAN_WEIGHT`, instead of to the nearest centroid.
    ends_by_hartigan: whether the last tenth of the steps are Hartigan's.
  """

  amplitude: float
  momentum: float
  assigns_by_hartigan: bool
  ends_by_hartigan: bool = True

  def num_hartigan_steps(self, num_steps: int) -> int:
    """Returns how many steps are Hartigan's: the last tenth, at most 20.

    Where clusters are small, more than 10 to 20 steps improve nothing.
    """
    return min(20, num_steps // 10) if self.ends_by_hartigan else 0


Schedule = tuple[np.ndarray, np.ndarray]
"""The noise a_t and the momentum of each step and layer, [T, L] float32."""

LLOYD = Method(0.0, 0.0, assigns_by_hartigan=False, ends_by_hartigan=False)
"""Plain k-means."""


def method(count: int, length: int, num_codes: int) -> Method:
  """Returns the best method for N sub-vectors of length D and K centroids.

  - Noise has to be of the size of a cell, to move sub-vectors from one to
    another. The cells of short sub-vectors are small compared with the data,
    and the mean of many moves less (the root of n_j). The paper has 1.
  - Large clusters move slowly and straight on; small ones would overshoot.
  - Where clusters are large, Hartigan's rule gives the nearest centroid, which
    costs a third to a half as much to find.

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
    assigns_by_hartigan=per_code < 48,
  )


def make_schedule(num_steps: int, methods: Sequence[Method]) -> Schedule:
  """Returns a_t = a * sqrt(1 - t / T) for t = 1..T, and the momentum.

  They are computed on the host: inside `jit` rounding makes `1 - t / T`
  negative at t = T for some T (10 and 1000 among them), and its root NaN. The
  last step has no momentum.

  Args:
    num_steps: T.
    methods: of each layer.
  """
  steps = np.arange(1, num_steps + 1, dtype=np.float64)[:, None]
  falling = np.sqrt(1 - steps / max(1, num_steps))
  amplitudes = np.array([[each.amplitude for each in methods]])
  momenta = np.array([[each.momentum for each in methods]])
  noise, momentum = falling * amplitudes, (steps < num_steps) * momenta
  return noise.astype(np.float32), momentum.astype(np.float32)

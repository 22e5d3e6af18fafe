"""What a platform does in a step of k-means, behind one interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from pqf_jax.kmeans import batching, hartigan
from pqf_jax.numerics import exact, segments

Tree = Any


class Points(NamedTuple):
  """The sub-vectors, less the mean of their layer.

  Attributes:
    columns: D arrays [B, 1024] float32, 0 where there is no sub-vector.
    norms: [B, 1024] float32, their squared norms.
    places: the layer of each block, and how full it is.
    scale: [L, D] float32, powers of two that exceed a layer's entries.
    norm_scale: [L, 1] float32, the same of its norms.
  """

  columns: tuple[jax.Array, ...]
  norms: jax.Array
  places: batching.Places
  scale: jax.Array
  norm_scale: jax.Array

  def first(self, num_blocks: int) -> Points:
    """Those of the first blocks."""
    return self._replace(
      columns=tuple(column[:num_blocks] for column in self.columns),
      norms=self.norms[:num_blocks],
      places=self.places._replace(
        layers=self.places.layers[:num_blocks],
        filled=self.places.filled[:num_blocks],
      ),
    )


class Totals(NamedTuple):
  """Sums over each cluster, float32.

  Attributes:
    vectors: [L, K, D].
    norms: [L, K], of squared norms.
    counts: [L, K].
  """

  vectors: jax.Array
  norms: jax.Array
  counts: jax.Array


class Candidates(NamedTuple):
  """Points that may be transferred.

  Attributes:
    points: all of them may.
    vectors: for the kernel of a GPU, see `transfers.transfer`; None: without.
  """

  points: Points
  vectors: jax.Array | None

  def transferred(
    self,
    centroids: jax.Array,
    counts: jax.Array,
    codes: jax.Array,
    weight: float,
  ) -> jax.Array:
    """The codes [B, 1024] after a step, from [L, K, D] and [L, K]."""
    return hartigan.transfer(
      self.points.columns,
      centroids,
      counts,
      self.points.places.layers,
      codes,
      weight=weight,
      vectors=self.vectors,
    )


class Form(NamedTuple):
  """How one platform does it.

  Attributes:
    prepare: (points) -> what the others need of the points, made once.
    codes: (prepared, codebooks [L, K, D]) -> [B, 1024] int32.
    sums: (prepared, codes, K, most rows of a layer on this device) -> whole
      numbers, to be added up over devices.
    totals: (prepared, those numbers) -> Totals.
    candidates: (points) -> Candidates, made once.
    unroll: steps of a turn of the loop, which itself costs time on a GPU.
    dot: (left, right) -> sums of products over the last axis, which round alike
      in every program.
  """

  prepare: Callable[[Points], Tree]
  codes: Callable[[Tree, jax.Array], jax.Array]
  sums: Callable[[Tree, jax.Array, int, int], Tree]
  totals: Callable[[Tree, Tree], Totals]
  candidates: Callable[[Points], Candidates]
  unroll: int = 1
  dot: Callable[[jax.Array, jax.Array], jax.Array] = exact.dot


def word_totals(points: Points, sums: jax.Array) -> Totals:
  """From the sums of the words, [L, K, 2 D + 2] float32."""
  return Totals(
    vectors=segments.from_words(sums[:, :, :-2]) * points.scale[:, None],
    norms=sums[:, :, -2] * (points.norm_scale * segments.LOW_UNIT),
    counts=sums[:, :, -1],
  )


def without_kernel(points: Points) -> Candidates:
  """Candidates on any platform."""
  return Candidates(points, None)

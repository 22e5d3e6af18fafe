"""The interface of a backend: what a platform computes in a step of k-means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from pqf_jax.kmeans import batching
from pqf_jax.numerics import exact, segments

Tree = Any


class Points(NamedTuple):
  """The sub-vectors of a batch, less the mean of their layer.

  Attributes:
    columns: D arrays [B, 1024] float32, 0 where there is no sub-vector.
    norms: [B, 1024] float32, their squared norms.
    layout: the layer of each tile, and how full it is.
    scale: [L, D] float32, powers of two that exceed a layer's entries.
    norm_scale: [L, 1] float32, powers of two that exceed a layer's norms.
  """

  columns: tuple[jax.Array, ...]
  norms: jax.Array
  layout: batching.Layout
  scale: jax.Array
  norm_scale: jax.Array

  def first(self, num_tiles: int) -> Points:
    """Returns the points of the first tiles."""
    return self.cut(lambda array: array[:num_tiles])

  def cut(self, cut: batching.Cut) -> Points:
    """Returns the points of some of the tiles."""
    return self._replace(
      columns=tuple(map(cut, self.columns)),
      norms=cut(self.norms),
      layout=self.layout._replace(
        layers=cut(self.layout.layers), filled=cut(self.layout.filled)
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


class Backend(NamedTuple):
  """The functions by which one platform takes a step.

  Attributes:
    prepare: (points) -> what `codes`, `sums` and `totals` need of the points,
      made once.
    codes: (prepared, codebooks [L, K, D]) -> nearest centroids, [B, 1024]
      int32.
    sums: (prepared, codes, K, rows of the largest layer on this device) ->
      whole numbers, to be added up over devices.
    totals: (prepared, those numbers) -> Totals.
    split: (points) -> the `vectors` of `hartigan.assign`, made once, or None if
      there is no kernel for it.
    unroll: steps in one turn of the loop, which itself costs time on a GPU.
    dot: (left, right) -> sums of products over the last axis, which round alike
      in every program.
  """

  prepare: Callable[[Points], Tree]
  codes: Callable[[Tree, jax.Array], jax.Array]
  sums: Callable[[Tree, jax.Array, int, int], Tree]
  totals: Callable[[Tree, Tree], Totals]
  split: Callable[[Points], jax.Array | None] = lambda points: None
  unroll: int = 1
  dot: Callable[[jax.Array, jax.Array], jax.Array] = exact.dot


def totals_of_words(points: Points, sums: jax.Array) -> Totals:
  """Converts sums of words, [L, K, 2 D + 2] float32, to totals."""
  return Totals(
    vectors=segments.from_words(sums[:, :, :-2]) * points.scale[:, None],
    norms=sums[:, :, -2] * (points.norm_scale * segments.LOW_UNIT),
    counts=sums[:, :, -1],
  )

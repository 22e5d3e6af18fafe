"""Non-maximum suppression with static shapes, equal to the greedy algorithm.

A box is dropped if a better one that was kept overlaps it by more than a
threshold. Boxes are ordered best first. A mask marks the rows that are boxes;
coordinates never do.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pqf_jax.models.mask_rcnn import boxes as box_ops

NUM_IN_TILE = 512


def suppress(
  boxes: jax.Array,
  valid: jax.Array,
  *,
  threshold: float,
  labels: jax.Array | None = None,
) -> jax.Array:
  """Returns which boxes non-maximum suppression keeps.

  With S[i, j] = "i is better than j and overlaps it", this iterates
  keep = valid and not any_i(keep[i] and S[i, :]). S is strictly triangular, so
  the fixed point is unique and is the greedy solution. The number of steps is
  the length of the longest chain of boxes that suppress each other: 3 to 8 for
  2,000 proposals.

  Args:
    boxes: [K, 4], best first.
    valid: bool [K]; other rows are neither kept nor suppress any.
    threshold: largest intersection over union at which both boxes are kept.
    labels: int [K]; only boxes of the same label suppress each other.

  Returns:
    bool [K].
  """
  # by[j, i]: i would suppress j. Row j is contiguous, as `any` reads it.
  by = box_ops.iou_matrix(boxes, boxes) > threshold
  rank = jnp.arange(boxes.shape[0])
  by = by & (rank[None, :] < rank[:, None]) & valid[:, None]
  if labels is not None:
    by = by & (labels[None, :] == labels[:, None])

  def step(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    keep, _ = state
    new = valid & ~jnp.any(by & keep[None, :], axis=1)
    return new, jnp.any(new != keep)

  start = valid, jnp.any(by)
  return lax.while_loop(lambda state: state[1], step, start)[0]


class _Progress(NamedTuple):
  """State of the loop over tiles: the next one, and the boxes kept so far."""

  tile: jax.Array
  num_kept: jax.Array
  indices: jax.Array
  boxes: jax.Array
  labels: jax.Array


def best_boxes(
  boxes: jax.Array,
  labels: jax.Array,
  valid: jax.Array,
  *,
  threshold: float,
  num_best: int,
) -> tuple[jax.Array, jax.Array]:
  """Returns the first boxes that suppression per label keeps.

  It goes through tiles of boxes and stops once `num_best` are kept. This is
  exact for any number of candidates, since whether a box is dropped depends on
  better kept boxes only; and it needs no matrix of all pairs.

  Args:
    boxes: [N, 4], best first.
    labels: int32 [N].
    valid: bool [N]; all valid boxes come first.
    threshold: see `suppress`.
    num_best: largest number of boxes to keep.

  Returns:
    (indices int32 [num_best], best first; bool [num_best], which of them
    exist. The other indices are 0.)
  """
  size = min(NUM_IN_TILE, boxes.shape[0])
  num_tiles = -(-boxes.shape[0] // size)
  rest = num_tiles * size - boxes.shape[0]
  boxes = jnp.pad(boxes, ((0, rest), (0, 0)))
  labels, valid = jnp.pad(labels, (0, rest)), jnp.pad(valid, (0, rest))
  slots = jnp.arange(num_best)

  def is_unfinished(state: _Progress) -> jax.Array:
    # Valid boxes come first: a tile that starts with another one is the end.
    start = jnp.minimum(state.tile, num_tiles - 1) * size
    more = (state.tile < num_tiles) & valid[start]
    return more & (state.num_kept < num_best)

  def step(state: _Progress) -> _Progress:
    start = state.tile * size

    def cut(values: jax.Array) -> jax.Array:
      return lax.dynamic_slice_in_dim(values, start, size)

    tile, tile_labels = cut(boxes), cut(labels)
    beaten = box_ops.iou_matrix(tile, state.boxes) > threshold
    beaten &= tile_labels[:, None] == state.labels[None, :]
    beaten &= (slots < state.num_kept)[None, :]
    remaining = cut(valid) & ~jnp.any(beaten, axis=1)
    keep = suppress(tile, remaining, threshold=threshold, labels=tile_labels)
    # Slot s is filled by the (s - num_kept + 1)-th box that the tile keeps.
    count = jnp.cumsum(keep.astype(jnp.int32))
    source = jnp.searchsorted(count, slots - state.num_kept + 1)
    source = jnp.minimum(source, size - 1)
    total = jnp.minimum(state.num_kept + count[-1], num_best)
    new = (slots >= state.num_kept) & (slots < total)
    return _Progress(
      state.tile + 1,
      total,
      jnp.where(new, start + source, state.indices),
      jnp.where(new[:, None], tile[source], state.boxes),
      jnp.where(new, tile_labels[source], state.labels),
    )

  zero = jnp.zeros((), jnp.int32)
  none = jnp.zeros(num_best, jnp.int32)
  start = _Progress(
    zero, zero, none, jnp.zeros((num_best, 4), boxes.dtype), none
  )
  end = lax.while_loop(is_unfinished, step, start)
  return end.indices, slots < end.num_kept

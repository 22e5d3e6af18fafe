"""Non-maximum suppression with static shapes, equal to the greedy algorithm.

A box is dropped if a better one that was kept overlaps it by more than a
threshold. Boxes are ordered best first; which of the rows are boxes at all is
told by a mask, never by their coordinates.
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
  """Which boxes are kept.

  With S[i, j] = "i is better than j and overlaps it", keep = valid and not
  any_i(keep[i] and S[i, :]) is iterated. S is strictly triangular, so that the
  fixed point is unique and is the greedy solution; it is reached after as many
  steps as the longest chain of boxes that suppress each other is long: 3 to 8
  for 2,000 proposals.

  Args:
    boxes: [K, 4], best first.
    valid: bool [K]; others neither stay nor suppress.
    threshold: of the intersection over union; equal overlaps are kept.
    labels: int [K]: only boxes of the same label suppress each other.

  Returns:
    bool [K].
  """
  # by[j, i]: i would suppress j. The row of j is contiguous, as `any` reads it.
  by = box_ops.iou_matrix(boxes, boxes) > threshold
  rank = jnp.arange(boxes.shape[0])
  by = by & (rank[None, :] < rank[:, None]) & valid[:, None]
  if labels is not None:
    by = by & (labels[None, :] == labels[:, None])
  return _fixed_point(by, valid)


def _fixed_point(by: jax.Array, valid: jax.Array) -> jax.Array:
  def step(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    keep, _ = state
    new = valid & ~jnp.any(by & keep[None, :], axis=1)
    return new, jnp.any(new != keep)

  start = valid, jnp.any(by)
  return lax.while_loop(lambda state: state[1], step, start)[0]


class _Progress(NamedTuple):
  """Of the walk over tiles: the next one, and what is kept so far."""

  tile: jax.Array
  num_kept: jax.Array
  index: jax.Array
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
  """The first boxes that suppression per label keeps, however many there are.

  Walks over tiles of boxes and stops once `num_best` are kept. This is exact
  for any number of candidates, since what is dropped behind a kept box depends
  on kept boxes only; and it needs no matrix of all pairs.

  Args:
    boxes: [N, 4], best first.
    labels: int32 [N].
    valid: bool [N]; all that are valid come first.
    threshold: see `suppress`.
    num_best: at most so many are kept.

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

  def go_on(state: _Progress) -> jax.Array:
    # All that are valid come first: a tile that starts otherwise is the end.
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
    open_ = cut(valid) & ~jnp.any(beaten, axis=1)
    keep = suppress(tile, open_, threshold=threshold, labels=tile_labels)
    # Slot s is filled by the (s - num_kept + 1)-th box that the tile keeps.
    count = jnp.cumsum(keep.astype(jnp.int32))
    source = jnp.searchsorted(count, slots - state.num_kept + 1)
    source = jnp.minimum(source, size - 1)
    total = jnp.minimum(state.num_kept + count[-1], num_best)
    new = (slots >= state.num_kept) & (slots < total)
    return _Progress(
      state.tile + 1,
      total,
      jnp.where(new, start + source, state.index),
      jnp.where(new[:, None], tile[source], state.boxes),
      jnp.where(new, tile_labels[source], state.labels),
    )

  zero = jnp.zeros((), jnp.int32)
  none = jnp.zeros(num_best, jnp.int32)
  start = _Progress(
    zero, zero, none, jnp.zeros((num_best, 4), boxes.dtype), none
  )
  found = lax.while_loop(go_on, step, start)
  return found.index, slots < found.num_kept

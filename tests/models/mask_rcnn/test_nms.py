import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pqf_jax.models.mask_rcnn import boxes as box_ops
from pqf_jax.models.mask_rcnn import nms

COUNT = 40
iou_matrix = jax.jit(box_ops.iou_matrix)


def greedy(boxes, valid, labels, threshold):
  """Returns the indices that the textbook algorithm keeps, best first."""
  overlap = np.asarray(iou_matrix(boxes, boxes))
  kept = []
  for i in np.flatnonzero(valid):
    rivals = [j for j in kept if labels[j] == labels[i]]
    if all(overlap[j, i] <= threshold for j in rivals):
      kept.append(i)
  return kept


def draw_case(seed):
  """Draws boxes on a coarse raster: many are equal, nested, or just touch."""
  rng = np.random.default_rng(seed)
  corner = rng.integers(0, 6, (COUNT, 2))
  sides = rng.integers(1, 5, (COUNT, 2))
  boxes = np.concatenate([corner, corner + sides], axis=1).astype(np.float32)
  labels = rng.integers(1, 4, COUNT).astype(np.int32)
  valid = rng.random(COUNT) < rng.choice([0.0, 0.5, 0.9, 1.0])
  return boxes, labels, valid


@jax.jit
def suppress(boxes, labels, valid, threshold):
  return nms.suppress(boxes, valid, threshold=threshold, labels=labels)


def suppress_unlabelled(boxes, threshold):
  """Suppresses boxes of one label, padded for the shared program."""
  boxes = np.asarray(boxes, np.float32)
  padded = np.zeros((COUNT, 4), np.float32)
  padded[: len(boxes)] = boxes
  valid = np.arange(COUNT) < len(boxes)
  labels = np.ones(COUNT, np.int32)
  keep = suppress(padded, labels, valid, np.float32(threshold))
  assert not keep[len(boxes) :].any()
  return keep[: len(boxes)]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.2, 0.25, 0.5, 0.7, 1.0]))
def test_the_fixed_point_is_the_greedy_solution(seed, threshold):
  boxes, labels, valid = draw_case(seed)
  keep = suppress(boxes, labels, valid, np.float32(threshold))
  expected = greedy(boxes, valid, labels, np.float32(threshold))
  np.testing.assert_array_equal(np.flatnonzero(keep), expected)


def test_a_chain_needs_as_many_steps_as_it_is_long():
  # Each box overlaps its neighbors by 1/3: every second one stays.
  left = np.arange(COUNT) * 5
  boxes = np.stack([left, 0 * left, left + 10, 0 * left + 10], axis=1)
  keep = suppress_unlabelled(boxes, 0.3)
  np.testing.assert_array_equal(keep, np.arange(COUNT) % 2 == 0)


def test_an_overlap_equal_to_the_threshold_is_kept():
  boxes = [[0, 0, 2, 1], [0, 0, 1, 1]]
  for threshold, second in ((0.5, True), (0.49, False)):
    keep = suppress_unlabelled(boxes, threshold)
    np.testing.assert_array_equal(keep, [True, second])


def test_without_labels_all_boxes_suppress_each_other():
  boxes, labels, valid = draw_case(1)
  keep = jax.jit(functools.partial(nms.suppress, threshold=0.3))(boxes, valid)
  same = suppress(boxes, np.ones_like(labels), valid, np.float32(0.3))
  np.testing.assert_array_equal(keep, same)
  assert 0 < keep.sum() < valid.sum()


@pytest.mark.parametrize("tile", [1, 7, 512])
@pytest.mark.parametrize("num_best", [5, 60])
def test_tiles_keep_the_first_of_the_greedy_solution(
  monkeypatch, tile, num_best
):
  monkeypatch.setattr(nms, "NUM_IN_TILE", tile)
  best_boxes = jax.jit(
    lambda *case: nms.best_boxes(*case, threshold=0.4, num_best=num_best)
  )
  for seed in range(12):
    boxes, labels, valid = draw_case(seed)
    valid = np.sort(valid)[::-1].copy()  # all that are valid come first
    indices, exists = map(np.asarray, best_boxes(boxes, labels, valid))
    expected = greedy(boxes, valid, labels, 0.4)[:num_best]
    np.testing.assert_array_equal(indices[exists], expected)
    assert not indices[~exists].any()
    np.testing.assert_array_equal(exists, np.arange(num_best) < len(expected))


def test_batches_give_what_their_images_give_alone():
  cases = [draw_case(seed) for seed in range(4)]
  stacked = [jnp.asarray(np.stack(part)) for part in zip(*cases, strict=True)]
  together = jax.jit(jax.vmap(suppress, (0, 0, 0, None)))
  alone = [suppress(*case, np.float32(0.5)) for case in cases]
  np.testing.assert_array_equal(
    together(*stacked, np.float32(0.5)), np.stack(alone)
  )

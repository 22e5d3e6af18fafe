import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pqf_jax.models.mask_rcnn import boxes as box_ops
from pqf_jax.models.mask_rcnn import nms

COUNT = 40


def greedy(overlap, valid, labels, threshold):
  """The textbook algorithm: indices that are kept, best first."""
  kept = []
  for i in np.flatnonzero(valid):
    rivals = [j for j in kept if labels[j] == labels[i]]
    if all(overlap[j, i] <= threshold for j in rivals):
      kept.append(i)
  return kept


def draw_case(seed):
  """Boxes on a coarse raster: many are equal, nested, or just touch."""
  rng = np.random.default_rng(seed)
  corner = rng.integers(0, 6, (COUNT, 2))
  sides = rng.integers(1, 5, (COUNT, 2))
  boxes = np.concatenate([corner, corner + sides], axis=1).astype(np.float32)
  labels = rng.integers(1, 4, COUNT).astype(np.int32)
  valid = rng.random(COUNT) < rng.choice([0.0, 0.5, 0.9, 1.0])
  return boxes, labels, valid


@jax.jit
def suppress(boxes, valid, labels, threshold):
  return nms.suppress(boxes, valid, threshold=threshold, labels=labels)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.2, 0.25, 0.5, 0.7, 1.0]))
def test_the_fixed_point_is_the_greedy_solution(seed, threshold):
  boxes, labels, valid = draw_case(seed)
  overlap = np.asarray(box_ops.iou_matrix(*[jnp.asarray(boxes)] * 2))
  keep = np.asarray(suppress(boxes, valid, labels, np.float32(threshold)))
  expected = greedy(overlap, valid, labels, np.float32(threshold))
  np.testing.assert_array_equal(np.flatnonzero(keep), expected)


def test_a_chain_needs_as_many_steps_as_it_is_long():
  # Each box overlaps its neighbors by 1/3: every second one stays.
  left = np.arange(50, dtype=np.float32) * 5
  boxes = np.stack([left, 0 * left, left + 10, 0 * left + 10], axis=1)
  keep = nms.suppress(jnp.asarray(boxes), jnp.ones(50, bool), threshold=0.3)
  np.testing.assert_array_equal(keep, np.arange(50) % 2 == 0)


def test_an_overlap_equal_to_the_threshold_is_kept():
  boxes = jnp.asarray([[0.0, 0.0, 2.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
  for threshold, second in ((0.5, True), (0.49, False)):
    keep = nms.suppress(boxes, jnp.ones(2, bool), threshold=threshold)
    np.testing.assert_array_equal(keep, [True, second])


@pytest.mark.parametrize("tile", [1, 7, 512])
@pytest.mark.parametrize("num_best", [5, 60])
def test_tiles_keep_the_first_of_the_greedy_solution(
  monkeypatch, tile, num_best
):
  monkeypatch.setattr(nms, "NUM_IN_TILE", tile)
  find = jax.jit(
    lambda *case: nms.best_boxes(*case, threshold=0.4, num_best=num_best)
  )
  for seed in range(12):
    boxes, labels, valid = draw_case(seed)
    valid = np.sort(valid)[::-1].copy()  # all that are valid come first
    index, found = map(np.asarray, find(boxes, labels, valid))
    overlap = np.asarray(box_ops.iou_matrix(*[jnp.asarray(boxes)] * 2))
    expected = greedy(overlap, valid, labels, 0.4)[:num_best]
    np.testing.assert_array_equal(index[found], expected)
    assert not index[~found].any()
    np.testing.assert_array_equal(found, np.arange(num_best) < len(expected))


def test_batches_give_what_their_images_give_alone():
  cases = [draw_case(seed) for seed in range(4)]
  stacked = [jnp.asarray(np.stack(part)) for part in zip(*cases, strict=True)]
  find = jax.vmap(
    lambda boxes, labels, valid: nms.suppress(
      boxes, valid, threshold=0.5, labels=labels
    )
  )
  alone = [
    suppress(boxes, valid, labels, np.float32(0.5))
    for boxes, labels, valid in cases
  ]
  np.testing.assert_array_equal(find(*stacked), np.stack(alone))

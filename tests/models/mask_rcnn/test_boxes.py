import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pqf_jax.models.mask_rcnn import boxes as box_ops

iou_matrix = jax.jit(box_ops.iou_matrix)
encode = jax.jit(box_ops.encode, static_argnames="weights")
decode = jax.jit(box_ops.decode, static_argnames="weights")


def random_boxes(rng, count, extent=100.0):
  corner = rng.uniform(0, extent, (count, 2))
  sides = rng.uniform(1, extent / 2, (count, 2))
  return np.concatenate([corner, corner + sides], axis=1).astype(np.float32)


def test_overlaps_are_those_of_counted_pixels():
  rng = np.random.default_rng(0)
  corner = rng.integers(0, 20, (12, 2))
  boxes = np.concatenate([corner, corner + rng.integers(1, 15, (12, 2))], 1)
  masks = np.zeros((12, 40, 40), bool)
  for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
    mask[y1:y2, x1:x2] = True
  common = (masks[:, None] & masks[None]).sum((2, 3))
  union = (masks[:, None] | masks[None]).sum((2, 3))
  overlaps = iou_matrix(*[jnp.asarray(boxes, jnp.float32)] * 2)
  np.testing.assert_allclose(overlaps, common / union, rtol=1e-6)
  np.testing.assert_array_equal(
    box_ops.area(jnp.asarray(boxes)), masks.sum((1, 2))
  )


def test_empty_boxes_overlap_nothing_not_even_themselves():
  boxes = jnp.asarray([[3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 9.0, 9.0]])
  np.testing.assert_array_equal(iou_matrix(boxes, boxes), [[0, 0], [0, 1]])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_decoding_undoes_encoding(seed, weighted):
  rng = np.random.default_rng(seed)
  weights = (10.0, 10.0, 5.0, 5.0) if weighted else box_ops.UNIT
  boxes, targets = random_boxes(rng, 5), random_boxes(rng, 5)
  offsets = encode(targets, boxes, weights=weights)
  back = decode(offsets, boxes, weights=weights)
  # Sides of 1 may have to become 50 times longer, which is the bound.
  np.testing.assert_allclose(back, targets, atol=1e-3)


def test_growth_is_bounded():
  box = jnp.asarray([[0.0, 0.0, 2.0, 4.0]])
  moved = decode(jnp.asarray([[0.5, 0.0, 99.0, -99.0]]), box)
  width = 2 * 1000 / 16
  np.testing.assert_allclose(
    moved, [[2 - width / 2, 2, 2 + width / 2, 2]], rtol=1e-6
  )


def test_offsets_of_padding_are_finite_and_so_is_their_gradient():
  gradient_of = jax.jit(jax.grad(lambda *pair: encode(*pair).sum()))
  none = jnp.zeros((3, 4))
  box = jnp.asarray(random_boxes(np.random.default_rng(0), 3))
  for pair in ((none, box), (box, none), (none, none)):
    assert np.isfinite(encode(*pair)).all()
    assert np.isfinite(gradient_of(*pair)).all()


def test_clipping_keeps_boxes_inside_and_sides_are_judged_after_it():
  boxes = jnp.asarray(
    [[-5.0, -5.0, 5.0, 5.0], [20.0, 3.0, 30.0, 9.0], [1.0, 1.0, 99.0, 99.0]]
  )
  clipped = box_ops.clip(boxes, jnp.float32(8), jnp.float32(16))
  np.testing.assert_array_equal(
    clipped, [[0, 0, 5, 5], [16, 3, 16, 8], [1, 1, 16, 8]]
  )
  np.testing.assert_array_equal(
    box_ops.is_large(clipped, 1e-3), [True, False, True]
  )


@pytest.mark.parametrize("function", [box_ops.encode, box_ops.iou_matrix])
def test_functions_equal_torchvisions(function):
  try:
    import torch
    from torchvision import ops
    from torchvision.models.detection import _utils
  except (ImportError, RuntimeError):
    pytest.skip("no working torchvision")
  rng = np.random.default_rng(1)
  first, second = random_boxes(rng, 9), random_boxes(rng, 9)
  pair = torch.tensor(first), torch.tensor(second)
  if function is box_ops.iou_matrix:
    expected = ops.box_iou(*pair)
  else:
    coder = _utils.BoxCoder((1.0, 1.0, 1.0, 1.0))
    expected = coder.encode([pair[0]], [pair[1]])[0]
  np.testing.assert_allclose(
    function(jnp.asarray(first), jnp.asarray(second)), expected, rtol=1e-5
  )

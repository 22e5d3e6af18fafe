"""Kernels that read several groups side by side."""

import jax
import numpy as np
import pytest

from pqf_jax import permute
from pqf_jax.core import blocks, channels
from pqf_jax.core import plan as plans
from pqf_jax.permutation import consumers

KERNEL = np.random.default_rng(0).standard_normal((12, 5)).astype(np.float32)


def segments(*ends):
  return tuple(
    channels.ChannelAxis(group, start=start, stop=stop)
    for group, start, stop in ends
  )


def find(kernel, row, **spec):
  plan = {"k/kernel": plans.LayerPlan(blocks.BlockSpec(**spec), 4, 1)}
  tree = {"k": {"kernel": kernel}}
  return consumers.find_consumers(tree, {"k/kernel": row}, plan)


def test_each_group_has_the_weights_of_its_segments():
  row = (segments(("g", 0, 4), ("h", 4, 6), ("g", 8, 12)), None)
  found = find(KERNEL, row, channels=2)
  (g,), no_notes = found["g"]
  assert not no_notes
  expected = np.concatenate([KERNEL[:4].T, KERNEL[8:].T])[..., None]
  np.testing.assert_array_equal(g.weights, expected)
  ((h,), _) = found["h"]
  np.testing.assert_array_equal(h.weights, KERNEL[4:6].T[..., None])
  assert g.slots == h.slots == 2


def test_segments_repeat_along_further_input_axes():
  kernel = KERNEL.reshape(2, 6, 5)
  row = (None, segments(("g", 0, 2), ("h", 2, 6)), None)
  found = find(kernel, row, channels=2, in_axes=(0, 1), out_axes=(2,))
  ((h,), _) = found["h"]
  expected = np.concatenate([kernel[0, 2:].T, kernel[1, 2:].T])[..., None]
  np.testing.assert_array_equal(h.weights, expected)


@pytest.mark.parametrize(
  ("ends", "note"),
  [
    ((("g", 0, 6), ("h", 8, 12)), "4 entries, which cut its 6 channels"),
    ((("g", 2, 6), ("h", 8, 12)), "4 entries, which reach over the start of"),
  ],
)
def test_sub_vectors_that_straddle_segments_are_left_out_with_a_note(
  ends, note
):
  found = find(KERNEL, (segments(*ends), None), channels=4)
  usable, (said,) = found["g"]
  assert not usable
  assert said.startswith("k/kernel has sub-vectors of ") and note in said
  assert len(found["h"][0]) == 1


def test_each_layer_of_a_stack_is_a_consumer_of_its_own_group():
  kernel = np.stack([KERNEL, 0 * KERNEL, KERNEL[::-1]], axis=1)
  own = channels.ChannelAxis("g", stacked=(1,))
  spec = {"channels": 2, "stack_axes": (1,)}
  found = find(kernel, (own, None, None), **spec)
  for i in (0, 2):
    (layer,), _ = found[f"g, layer {i}"]
    np.testing.assert_array_equal(layer.weights[..., 0], kernel[:, i].T)
  assert found["g, layer 1"] == (
    [],
    ["k/kernel is all zeros: no order helps it"],
  )
  # Layers of one order are consumers of one group.
  found = find(kernel, (channels.ChannelAxis("g"), None, None), **spec)
  assert len(found["g"][0]) == 2 and len(found["g"][1]) == 1


def test_layers_of_different_orders_that_share_sub_vectors_are_left_out():
  kernel = np.stack([KERNEL, KERNEL[::-1]])
  own = channels.ChannelAxis("g", stacked=(0,))
  found = find(kernel, (None, own, None), channels=2)  # layers are taps
  assert list(found) == ["g, layer 0", "g, layer 1"]
  for usable, (note,) in found.values():
    assert not usable and "reach over layers" in note


def test_every_segment_gets_an_order_of_its_own():
  rng = np.random.default_rng(1)
  shapes = {"one": (3, 16), "two": (3, 32), "read": (48, 64)}
  tree = {
    name: {"kernel": rng.standard_normal(shape).astype(np.float32)}
    for name, shape in shapes.items()
  }
  tree["read"]["kernel"] *= rng.uniform(0.1, 2, (48, 1)).astype(np.float32)
  one, two = channels.ChannelAxis("one"), channels.ChannelAxis("two")
  ends = (("one", 0, 16), ("two", 16, 48))
  axes = {
    "one/kernel": (None, one),
    "two/kernel": (None, two),
    "read/kernel": (segments(*ends), None),
  }
  plan = {"read/kernel": plans.LayerPlan(blocks.BlockSpec(4), 16, 1)}
  permuted, orders, reports = permute.permute_channels(
    jax.random.key(0), tree, axes, plan
  )
  assert list(orders) == ["one", "two"]
  for report, (group, start, stop) in zip(reports, ends, strict=True):
    assert report.accepted
    for value, kernels in (
      (report.log_det_before, tree),
      (report.log_det_after, permuted),
    ):
      rows = np.asarray(kernels["read"]["kernel"])[start:stop].T.reshape(-1, 4)
      expected = np.linalg.slogdet(np.cov(rows.T))[1]
      np.testing.assert_allclose(value, expected, atol=1e-3)
    np.testing.assert_array_equal(
      permuted[group]["kernel"], tree[group]["kernel"][:, orders[group]]
    )

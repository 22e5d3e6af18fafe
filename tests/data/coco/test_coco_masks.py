import re

import hypothesis
import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import strategies
from pycocotools import mask as coco_rle

from pqf_jax.data.coco import masks as coco_masks
from tests.data.coco import tiny_coco

SHAPES = strategies.tuples(
  strategies.integers(0, 4),
  strategies.integers(1, 20),
  strategies.integers(1, 20),
)


@hypothesis.given(arrays.arrays(bool, SHAPES))
@hypothesis.settings(max_examples=60, deadline=None)
def test_masks_survive_both_run_length_codes_and_the_bits(masks):
  count, height, width = masks.shape
  if count:
    codes = coco_masks.encode(masks)
    assert not any(coco_masks.fault(code, height, width) for code in codes)
    for code, mask in zip(codes, masks, strict=True):
      np.testing.assert_array_equal(
        coco_masks.decode(code, height, width), mask
      )
      plain = {"size": [height, width], "counts": tiny_coco.runs(mask)}
      assert coco_masks.fault(plain, height, width) == ""
      np.testing.assert_array_equal(
        coco_masks.decode(plain, height, width), mask
      )
  bits = coco_masks.to_bits(masks, count + 2, 21)
  assert bits.shape == (count + 2, 21, 3)
  assert bits.dtype == np.uint8
  unpacked = np.unpackbits(bits, axis=-1)
  np.testing.assert_array_equal(unpacked[:count, :height, :width], masks)
  assert unpacked.sum() == masks.sum()


def test_a_polygon_is_the_pixels_whose_centers_it_holds():
  # A right triangle with legs of 8 pixels along the top and the left.
  mask = coco_masks.decode([[0, 0, 8, 0, 0, 8]], 10, 10)
  rows, columns = np.mgrid[:10, :10] + 0.5
  inside = rows + columns < 8
  on_the_edge = rows + columns == 8
  np.testing.assert_array_equal(mask[~on_the_edge], inside[~on_the_edge])


def test_two_polygons_are_one_mask():
  first, second = [0, 0, 4, 0, 4, 4, 0, 4], [6, 6, 9, 6, 9, 9, 6, 9]
  both = coco_masks.decode([first, second], 10, 10)
  parts = [coco_masks.decode([part], 10, 10) for part in (first, second)]
  np.testing.assert_array_equal(both, parts[0] | parts[1])
  assert both.sum() == 16 + 9


def test_polygons_of_two_corners_have_no_area():
  good = [0, 0, 4, 0, 4, 4]
  assert coco_masks.clean([[1, 1, 5, 5], good]) == [good]
  assert coco_masks.fault(coco_masks.clean([[1, 1, 5, 5]]), 9, 9) == (
    "has no mask (its segmentation is missing or empty)"
  )


@hypothesis.given(
  arrays.arrays(bool, (7, 9)),
  strategies.integers(0, 10**6),
  strategies.text(
    strategies.characters(min_codepoint=40, max_codepoint=120), max_size=4
  ),
)
@hypothesis.settings(max_examples=300, deadline=None)
def test_a_changed_code_is_refused_or_is_what_pycocotools_reads(
  mask, place, inserted
):
  (code,) = coco_masks.encode(mask[None])
  cut = place % (len(code["counts"]) + 1)
  counts = code["counts"][:cut] + inserted + code["counts"][cut + 1 :]
  code = {"size": [7, 9], "counts": counts}
  if not coco_masks.fault(code, 7, 9):
    np.testing.assert_array_equal(
      coco_masks.decode(code, 7, 9), coco_rle.decode(code)
    )


@hypothesis.given(arrays.arrays(bool, SHAPES))
@hypothesis.settings(max_examples=60, deadline=None)
def test_the_extent_is_that_of_the_pixels(masks):
  for mask in masks:
    # Runs of no pixels, which some programs write, add nothing.
    code = {"size": [*mask.shape], "counts": [0, 0, *tiny_coco.runs(mask), 0]}
    x1, y1, x2, y2 = coco_masks.extent(code, *mask.shape)
    expected = tiny_coco.box_of(mask) if mask.any() else [0, 0, 0, 0]
    assert [x1, y1, x2 - x1, y2 - y1] == expected


def test_the_extent_of_polygons_ends_with_the_image():
  polygons = [[2, 3, 6.5, 3, 4, 5], [5, 4, 12, -6, 9, 2]]
  assert coco_masks.extent(polygons, 8, 10) == (2, 0, 10, 5)
  assert coco_masks.fault(polygons, 8, 10) == ""


@pytest.mark.parametrize(
  ("segmentation", "message"),
  [
    (None, "no mask"),
    ([], "no mask"),
    ({}, "no mask"),
    ("52203", "type str"),
    ([[1, 2, 3, 4, 5, 6, 7]], "polygon of 7 numbers, not of x, y"),
    ([[1, 2, 3, None, 5, 6]], "not a list of numbers"),
    ([[1, 2, 3, float("nan"), 5, 6]], "not a list of numbers"),
    ([7], "not a list of numbers"),
    (
      {"size": [4, 5], "counts": [20]},
      r"size \[4, 5\], but its image has \[4, 4\]",
    ),
    ({"size": [4, 4]}, "without counts"),
    ({"size": [4, 4], "counts": [3, 4]}, "7 pixels in all.* 4 x 4 = 16"),
    ({"size": [4, 4], "counts": [3, 40]}, "43 pixels"),
    ({"size": [4, 4], "counts": [20, -4]}, "not whole numbers"),
    ({"size": [4, 4], "counts": [8.5, 7.5]}, "not whole numbers"),
    ({"size": [4, 4], "counts": [True, 15]}, "not whole numbers"),
    ({"size": [4, 4], "counts": [10**299, 8]}, "of 1e.299 pixels"),
    ({"size": [4, 4], "counts": "hello"}, "cannot be read: 'hello'"),
    ({"size": [4, 4], "counts": ""}, "cannot be read"),
    ({"size": [4, 4], "counts": "\ud800"}, "cannot be read"),
    ({"size": [4, 4], "counts": "h\xe4h"}, "cannot be read"),
    ({"size": [4, 4], "counts": "oooooooooo0"}, "cannot be read"),
    ({"size": [4, 4], "counts": "0"}, "0 pixels in all.* 4 x 4 = 16"),
    ({"size": [4, 4], "counts": "34"}, "7 pixels in all"),
    ({"size": [4, 4], "counts": "@`0"}, "not whole numbers"),
    ([[1, 2, 3, 1e9, 5, 6]], r"y = 1e\+09, which is far outside"),
    ([[1, 2, -1e300, 4, 5, 6]], r"x = -1e\+300, which is far"),
    ([[1, 2, 3, 4, 10**299, 6]], r"x = 1e\+299, which is far"),
    ([[0, 0, 4, 4] * 50], "outline is 800 pixels long, .* 4 x 4"),
  ],
)
def test_a_fault_of_a_mask_is_described(segmentation, message):
  assert re.search(message, coco_masks.fault(segmentation, 4, 4))

"""Drawings: pixels where the objects are, captions where they fit."""

import io

import numpy as np
import pytest
from PIL import Image

from pqf_jax.report import drawings

HEIGHT, WIDTH = 600, 800
RED = np.array(drawings.COLORS[0])


def one_object(box, text: str = "", mask=None) -> np.ndarray:
  pixels = np.full((HEIGHT, WIDTH, 3), 100, np.uint8)
  if mask is None:
    mask = np.zeros((HEIGHT, WIDTH), bool)
  return drawings.draw_objects(pixels, np.float32([box]), mask[None], [text])


def test_an_image_without_objects_is_itself():
  pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3))
  pixels = pixels.astype(np.uint8)
  drawn = drawings.draw_objects(
    pixels, np.zeros((0, 4)), np.zeros((0, HEIGHT, WIDTH), bool), []
  )
  np.testing.assert_array_equal(drawn, pixels)


def test_the_outline_is_the_outermost_pixels_of_the_box():
  drawn = one_object([10, 20, 110, 50])
  red = (drawn == RED).all(axis=-1)
  rows, columns = np.nonzero(red)
  assert (rows.min(), rows.max(), columns.min(), columns.max()) == (
    20,
    49,
    10,
    109,
  )
  assert red.sum() == 2 * 100 + 2 * 28
  assert (drawn[~red] == 100).all()


def test_masks_are_tinted_where_they_are():
  mask = np.zeros((HEIGHT, WIDTH), bool)
  mask[100:130, 40:90] = True
  drawn = one_object([200, 200, 210, 210], mask=mask)
  expected = np.rint(100 + drawings.TINT * (RED - 100.0))
  assert (drawn[mask] == expected).all()
  assert (drawn[300:] == 100).all()


def test_a_caption_is_drawn_if_it_fits_into_its_box():
  wide, narrow = (10, 20, 210, 60), (10, 20, 22, 60)
  assert (one_object(wide, "cat 0.97") != one_object(wide)).any()
  np.testing.assert_array_equal(
    one_object(narrow, "cat 0.97"), one_object(narrow)
  )


def test_objects_in_turn_have_colors_of_their_own():
  count = len(drawings.COLORS)
  boxes = np.float32([[20 * i, 5, 20 * i + 10, 15] for i in range(count)])
  drawn = drawings.draw_objects(
    np.zeros((HEIGHT, WIDTH, 3), np.uint8),
    boxes,
    np.zeros((count, HEIGHT, WIDTH), bool),
    [""] * count,
  )
  colors = [tuple(drawn[5, 20 * i].tolist()) for i in range(count)]
  assert colors == list(drawings.COLORS)
  assert len(set(colors)) == count


@pytest.mark.parametrize(
  ("shape", "scale"), [((256, 200), 2), ((1, 1), 512), ((300, 512), 1)]
)
def test_small_images_are_enlarged_by_whole_numbers(shape, scale):
  pixels = np.zeros((*shape, 3), np.uint8)
  pixels[0, 0] = 255
  drawn = drawings.draw_objects(
    pixels, np.zeros((0, 4)), np.zeros((0, *shape), bool), []
  )
  assert drawn.shape == (scale * shape[0], scale * shape[1], 3)
  assert drawn.sum() == 3 * 255 * scale**2


def test_a_box_beyond_the_image_is_cut_off():
  drawn = one_object([-50, -50, 5000, 5000], "anything")
  assert drawn.shape == (HEIGHT, WIDTH, 3)


def test_pictures_stand_side_by_side():
  left = np.full((600, 520, 3), 7, np.uint8)
  right = np.full((512, 700, 3), 9, np.uint8)
  data = drawings.side_by_side([("ground truth", left), ("dense", right)])
  sheet = np.asarray(Image.open(io.BytesIO(data)))
  places = []
  for value in (7, 9):
    rows, columns = np.nonzero((sheet == value).all(axis=-1))
    places.append((rows.min(), columns.min(), len(rows)))
  (left_top, left_start, left_size), (right_top, right_start, right_size) = (
    places
  )
  assert left_size >= left.shape[0] * left.shape[1]
  assert right_size >= right.shape[0] * right.shape[1]
  assert left_top == right_top > 0
  assert right_start > left_start + 520
  # The titles are above the pictures.
  assert (sheet[:left_top] < 128).any()


def test_captions():
  names = ("", "cat", "")
  assert drawings.captions([1, 2], names) == ["cat", "2"]
  assert drawings.captions([1, 1], names, [0.5, 0.996]) == [
    "cat 0.50",
    "cat 1.00",
  ]


def test_codewords_are_tiles_whose_colors_are_their_weights():
  rng = np.random.default_rng(0)
  codewords = rng.choice([-1.0, 0.0, 1.0], (5, 18))
  picture = Image.open(io.BytesIO(drawings.draw_codewords(codewords, (3, 3))))
  pixels = np.asarray(picture.convert("RGBA"))[:: drawings.WEIGHT_PIXELS]
  pixels = pixels[:, :: drawings.WEIGHT_PIXELS]
  colors = {-1: drawings.BLUE, 0: drawings.WHITE, 1: drawings.ORANGE}
  columns = pixels.shape[1] // 7
  for number, codeword in enumerate(codewords):
    row, column = divmod(number, columns)
    tile = pixels[4 * row : 4 * row + 3, 7 * column : 7 * column + 6]
    images = codeword.reshape(2, 3, 3)
    for y, x in np.ndindex(3, 6):
      expected = (*colors[int(images[x // 3, y, x % 3])], 255)
      assert tuple(tile[y, x]) == expected
  # Gaps, and places behind the last codeword.
  assert (pixels[..., 3] == 0).sum() == pixels[..., 3].size - 5 * 18


@pytest.mark.parametrize("taps", [(), (5,), (1, 1)])
def test_codewords_without_an_image_are_columns(taps):
  codewords = np.zeros((7, 10))
  picture = Image.open(io.BytesIO(drawings.draw_codewords(codewords, taps)))
  assert picture.height % (11 * drawings.WEIGHT_PIXELS) == 0
  assert picture.width % (2 * drawings.WEIGHT_PIXELS) == 0

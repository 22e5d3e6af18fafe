"""Draws images with their objects, side by side, and codebooks."""

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Colors of the objects of an image, in turn: they differ in hue, and stand out
# on dark and on bright images.
COLORS = (
  (230, 25, 75),
  (60, 180, 75),
  (255, 190, 25),
  (67, 99, 216),
  (245, 130, 49),
  (145, 30, 180),
  (66, 212, 244),
  (240, 50, 230),
)
TINT = 0.45
# Smaller images are enlarged, so that outlines and captions are legible.
MIN_SIDE = 512
MARGIN, FONT_SIZE = 8, 12
PAPER, INK = (255, 255, 255), (30, 30, 30)
# Of a codebook: negative, zero and positive weights, which differ for everyone.
BLUE, WHITE, ORANGE = (10, 80, 180), (247, 247, 247), (200, 80, 10)
WEIGHT_PIXELS = 4
SATURATED = 0.99  # of the weights are below the strongest color


def captions(
  labels: Sequence[int], names: Sequence[str], scores: Sequence[float] = ()
) -> list[str]:
  """Returns name and score of each object, such as `cat 0.97`.

  Args:
    labels: [N].
    names: by label; '' where the label has no name.
    scores: [N], or empty for ground truth.
  """
  texts = [names[label] or str(label) for label in labels]
  if not len(scores):
    return texts
  return [
    f"{text} {score:.2f}" for text, score in zip(texts, scores, strict=True)
  ]


def draw_objects(
  pixels: np.ndarray,
  boxes: np.ndarray,
  masks: np.ndarray,
  texts: Sequence[str],
) -> np.ndarray:
  """Draws an image with tinted masks, outlined boxes and captions.

  Args:
    pixels: uint8 [H, W, 3].
    boxes: [N, 4], x1, y1, x2, y2 in pixels.
    masks: bool [N, H, W].
    texts: [N]; a text that is wider than its box is left out.

  Returns:
    uint8 [s H, s W, 3], enlarged by the smallest integer s that makes the
    longer side `MIN_SIDE` or more.
  """
  scale = -(-MIN_SIDE // max(pixels.shape[:2]))
  canvas = pixels.astype(np.float32)
  for index, mask in enumerate(masks):
    tint = np.array(COLORS[index % len(COLORS)], np.float32)
    canvas[mask] += TINT * (tint - canvas[mask])
  height, width = pixels.shape[:2]
  picture = Image.fromarray(np.rint(canvas).astype(np.uint8)).resize(
    (scale * width, scale * height), Image.Resampling.NEAREST
  )
  draw = ImageDraw.Draw(picture)
  font = ImageFont.load_default(FONT_SIZE)
  for index, (box, text) in enumerate(zip(boxes, texts, strict=True)):
    x1, y1, x2, y2 = (scale * float(value) for value in box)
    color = COLORS[index % len(COLORS)]
    # x2 is the outer edge of the box, so its last pixel is x2 - 1.
    draw.rectangle((x1, y1, max(x2 - 1, x1), max(y2 - 1, y1)), outline=color)
    if text and draw.textlength(text, font) <= x2 - x1:
      frame = draw.textbbox((x1 + 2, y1 + 1), text, font)
      draw.rectangle(frame, fill=color)
      draw.text((x1 + 2, y1 + 1), text, fill=PAPER, font=font)
  return np.asarray(picture)


def side_by_side(panels: Sequence[tuple[str, np.ndarray]]) -> bytes:
  """Returns a PNG file of titled pictures in a row.

  Args:
    panels: (title, uint8 [H, W, 3]) from left to right.
  """
  top = 2 * MARGIN + FONT_SIZE
  width = MARGIN + sum(MARGIN + picture.shape[1] for _, picture in panels)
  height = top + MARGIN + max(picture.shape[0] for _, picture in panels)
  sheet = Image.new("RGB", (width, height), PAPER)
  draw = ImageDraw.Draw(sheet)
  font = ImageFont.load_default(FONT_SIZE)
  left = MARGIN
  for title, picture in panels:
    draw.text((left, MARGIN), title, fill=INK, font=font)
    sheet.paste(Image.fromarray(picture), (left, top))
    left += picture.shape[1] + MARGIN
  file = io.BytesIO()
  sheet.save(file, format="PNG", optimize=True)
  return file.getvalue()


def draw_codewords(codewords: np.ndarray, taps: Sequence[int]) -> bytes:
  """Draws codewords in a grid, row by row.

  Where taps make an image, as those of a 3x3 kernel do, a codeword is a row of
  such images, one a channel; else it is a column of its weights.

  Args:
    codewords: [K, D], ordered (channel, taps).
    taps: sizes of the taps; their product divides D.

  Returns:
    A PNG file, twice as wide as high or nearly so; what is between the
    codewords is transparent.
  """
  num_codes, length = codewords.shape
  height, width = taps if len(taps) == 2 and min(taps) > 1 else (length, 1)
  images = codewords.reshape(num_codes, -1, height, width)
  tiles = images.transpose(0, 2, 1, 3).reshape(num_codes, height, -1)
  strongest = np.quantile(np.abs(tiles), SATURATED) or 1
  levels = np.rint(127 + 127 * np.clip(tiles / strongest, -1, 1))
  # One pixel a weight, a gap of one behind each tile.
  gap, (high, wide) = 255, (height + 1, tiles.shape[2] + 1)
  columns = min(num_codes, math.ceil(math.sqrt(2 * num_codes * high / wide)))
  rows = -(-num_codes // columns)
  grid = np.full((rows * columns, high, wide), gap, np.uint8)
  grid[:num_codes, :-1, :-1] = levels
  sheet = grid.reshape(rows, columns, high, wide).transpose(0, 2, 1, 3)
  picture = Image.fromarray(sheet.reshape(rows * high, columns * wide))
  picture.putpalette(_palette())
  file = io.BytesIO()
  size = (WEIGHT_PIXELS * picture.width, WEIGHT_PIXELS * picture.height)
  picture.resize(size, Image.Resampling.NEAREST).save(
    file, format="PNG", optimize=True, transparency=gap
  )
  return file.getvalue()


def _palette() -> list[int]:
  """Returns the colors of the levels 0 to 254, of which 127 is zero."""
  shares = np.linspace(0, 1, 128)[:, None]
  low = BLUE + shares * np.subtract(WHITE, BLUE)
  high = WHITE + shares * np.subtract(ORANGE, WHITE)
  colors = np.concatenate([low, high[1:], [WHITE]])
  return [int(value) for value in np.rint(colors).ravel()]

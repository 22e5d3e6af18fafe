"""Masks of objects in COCO's notations, and as bits for the device.

A segmentation is a list of polygons (each a flat list x1, y1, x2, y2, ... in
pixels) or a run-length code {"size": [height, width], "counts"}, whose counts
are a list or pycocotools' compressed string. Runs go down the columns.
"""

import math
from typing import Any

import numpy as np
from pycocotools import mask as coco_rle

Segmentation = list[list[float]] | dict[str, Any]
# Of a polygon: three corners. pycocotools would take two for those of a box.
LEAST_NUMBERS = 6
# Of a compressed run: 30 bits, more than any image has pixels.
MOST_CHARACTERS = 6


def clean(segmentation: Any) -> Any:
  """Removes polygons of fewer than three corners, which have no area.

  The segmentation is as read from JSON, perhaps invalid.
  """
  if not isinstance(segmentation, list):
    return segmentation
  return [
    polygon
    for polygon in segmentation
    if not isinstance(polygon, list) or len(polygon) >= LEAST_NUMBERS
  ]


def fault(segmentation: Any, height: int, width: int) -> str:
  """Describes what is wrong with a segmentation from `clean`; '' if valid.

  pycocotools crashes on some faults and for others draws beyond the image,
  which is `height` x `width` pixels, nothing at all, or whatever was in memory.
  """
  if not segmentation:
    return "has no mask (its segmentation is missing or empty)"
  if isinstance(segmentation, dict):
    return _fault_of_runs(segmentation, height, width)
  if not isinstance(segmentation, list):
    return f"has a segmentation of type {type(segmentation).__name__}"
  faults = (_fault_of_polygon(part, height, width) for part in segmentation)
  return next(filter(None, faults), "")


def _fault_of_polygon(polygon: Any, height: int, width: int) -> str:
  # Whole lists are checked at once: COCO has fifty million numbers.
  if (
    not isinstance(polygon, list)
    or not set(map(type, polygon)) <= {int, float}
    or not math.isfinite(sum(polygon))
  ):
    return f"has a polygon that is not a list of numbers: {str(polygon)[:60]}"
  if len(polygon) % 2:
    return f"has a polygon of {len(polygon)} numbers, not of x, y pairs"
  span = 0.0
  for axis, side in ("x", width), ("y", height):
    values = polygon[axis == "y" :: 2]
    least, most = min(values), max(values)
    if least < -side or most > 2 * side:
      worst = float(least if least < -side else most)
      return (
        f"has a polygon with {axis} = {worst:g}, which is far outside of its "
        f"image of {height} x {width} pixels (height x width)"
      )
    span += most - least
  # Drawing takes memory for every pixel of an outline. One that is traced
  # around every single pixel has four for each.
  limit = 4 * height * width + 2 * len(polygon)
  if len(polygon) * span / 2 > limit:
    corners = np.array(polygon, float).reshape(-1, 2)
    length = np.abs(corners - np.roll(corners, 1, axis=0)).sum()
    if length > limit:
      return (
        f"has a polygon whose outline is {length:.0f} pixels long, too long "
        f"for its image of {height} x {width}"
      )
  return ""


def _fault_of_runs(code: dict[str, Any], height: int, width: int) -> str:
  counts = code.get("counts")
  if code.get("size") != [height, width]:
    size = str(code.get("size"))[:60]
    return f"has a mask of size {size}, but its image has [{height}, {width}]"
  if not isinstance(counts, str | list):
    return "has a run-length code without counts"
  runs = _runs(counts)
  if not runs:
    return f"has a run-length code that cannot be read: {str(counts)[:60]!r}"
  if not all(type(run) is int and run >= 0 for run in runs):
    return "has runs that are not whole numbers from 0 on"
  if sum(runs) != height * width:
    return (
      f"has runs of {float(sum(runs)):.15g} pixels in all, but its image has "
      f"{height} x {width} = {height * width}"
    )
  return ""


def _runs(counts: str | list[int]) -> list[int]:
  """Returns the lengths of the runs; [] for a damaged string.

  In pycocotools' compressed string, a character holds five bits of a number,
  lowest first, and whether others follow; the highest bit of the last is the
  sign. From the fourth on, a number is the difference to the run before the
  last. pycocotools itself reads on behind the end of a string that is cut off.
  """
  if isinstance(counts, list):
    return counts
  digits = np.frombuffer(counts.encode(errors="surrogatepass"), np.uint8) - 48
  ends = np.flatnonzero(digits & 32 == 0)
  starts = np.append(0, ends[:-1] + 1)
  if (
    not ends.size
    or ends[-1] != digits.size - 1
    or digits.max() > 63
    or (ends - starts).max() >= MOST_CHARACTERS
  ):
    return []
  place = np.arange(digits.size) - np.repeat(starts, ends - starts + 1)
  runs = np.add.reduceat((digits & 31).astype(np.int64) << 5 * place, starts)
  runs -= (digits[ends] & 16).astype(np.int64) << 5 * (ends - starts) + 1
  runs[1::2] = np.cumsum(runs[1::2])
  runs[2::2] = np.cumsum(runs[2::2])
  return runs.tolist()


def extent(
  segmentation: Segmentation, height: int, width: int
) -> tuple[float, float, float, float]:
  """Returns x1, y1, x2, y2 around a mask without `fault`, clipped to the image.

  They have no area where no part of the mask is in the image.
  """
  if isinstance(segmentation, list):
    xs = [x for part in segmentation for x in part[::2]]
    ys = [y for part in segmentation for y in part[1::2]]
    x1, x2 = (min(max(x, 0), width) for x in (min(xs), max(xs)))
    y1, y2 = (min(max(y, 0), height) for y in (min(ys), max(ys)))
    return x1, y1, x2, y2
  runs = np.array(_runs(segmentation["counts"]))
  ends = np.cumsum(runs)[1::2]
  lengths = runs[1::2]
  first, last = (ends - lengths)[lengths > 0], (ends - 1)[lengths > 0]
  if not first.size:
    return 0, 0, 0, 0
  top, bottom = int((first % height).min()), int((last % height).max())
  if (first // height != last // height).any():
    top, bottom = 0, height - 1
  return int(first[0]) // height, top, int(last[-1]) // height + 1, bottom + 1


def decode(segmentation: Segmentation, height: int, width: int) -> np.ndarray:
  """Returns the mask of a segmentation without `fault`, bool [height, width].

  pycocotools draws polygons.
  """
  if isinstance(segmentation, dict):
    runs = _runs(segmentation["counts"])
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return flat.reshape(width, height).T
  polygons = coco_rle.frPyObjects(segmentation, height, width)
  return coco_rle.decode(coco_rle.merge(polygons)).astype(bool)


def encode(masks: np.ndarray) -> list[dict[str, Any]]:
  """Returns compressed run-length codes of bool [N, H, W], ready for JSON."""
  # [H, W, N] in Fortran's order, one mask after the other.
  columns = np.ascontiguousarray(masks.swapaxes(1, 2)).view(np.uint8).T
  return [
    {
      "size": [int(side) for side in rle["size"]],
      "counts": rle["counts"].decode(),
    }
    for rle in coco_rle.encode(columns)
  ]


def to_bits(masks: np.ndarray, num_rows: int, side: int) -> np.ndarray:
  """Writes masks into square buffers, eight pixels of a row in a byte.

  This saves seven eighths of the bytes that are sent to the device.

  Args:
    masks: bool [N, H, W], N <= num_rows and H, W <= side.
    num_rows: G.
    side: S in pixels.

  Returns:
    uint8 [G, S, ceil(S / 8)], numpy.packbits of the last axis; 0 outside.
  """
  padded = np.zeros((num_rows, side, -(-side // 8)), np.uint8)
  # packbits is ten times slower on rows that are read backwards.
  bits = np.packbits(np.ascontiguousarray(masks), axis=-1)
  padded[: bits.shape[0], : bits.shape[1], : bits.shape[2]] = bits
  return padded

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

  pycocotools itself crashes on some faults and draws beyond the image, which
  is `height` x `width` pixels, or nothing at all, for others.
  """
  if not segmentation:
    return "has no mask (its segmentation is missing or empty)"
  if isinstance(segmentation, dict):
    return _fault_of_runs(segmentation, [height, width])
  if not isinstance(segmentation, list):
    return f"has a segmentation of type {type(segmentation).__name__}"
  for polygon in segmentation:
    # Whole lists are checked at once: COCO has fifty million numbers.
    if (
      not isinstance(polygon, list)
      or not set(map(type, polygon)) <= {int, float}
      or not math.isfinite(sum(polygon))
    ):
      return f"has a polygon that is not a list of numbers: {str(polygon)[:60]}"
    if len(polygon) % 2:
      return f"has a polygon of {len(polygon)} numbers, not of x, y pairs"
  return ""


def _fault_of_runs(code: dict[str, Any], size: list[int]) -> str:
  counts = code.get("counts")
  if code.get("size") != size:
    return f"has a mask of size {code.get('size')}, but its image has {size}"
  if isinstance(counts, str):
    try:
      area = int(coco_rle.area({"size": size, "counts": counts.encode()}))
      coco_rle.decode({"size": size, "counts": counts.encode()})
    except ValueError as error:
      return f"has a run-length code that cannot be read: {error}"
    return "" if area <= size[0] * size[1] else "has runs outside its image"
  if not isinstance(counts, list):
    return "has a run-length code without counts"
  if not all(isinstance(run, int) and run >= 0 for run in counts):
    return "has runs that are not whole numbers from 0 on"
  if sum(counts) != size[0] * size[1]:
    return (
      f"has runs of {sum(counts)} pixels in all, but its image has "
      f"{size[0]} x {size[1]} = {size[0] * size[1]}"
    )
  return ""


def decode(segmentation: Segmentation, height: int, width: int) -> np.ndarray:
  """Returns the mask of a segmentation without `fault`, bool [height, width].

  pycocotools draws it.
  """
  compressed: Any = segmentation
  if isinstance(segmentation, list):
    polygons = coco_rle.frPyObjects(segmentation, height, width)
    compressed = coco_rle.merge(polygons)
  elif isinstance(segmentation["counts"], list):
    compressed = coco_rle.frPyObjects(segmentation, height, width)
  return coco_rle.decode(compressed).astype(bool)


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

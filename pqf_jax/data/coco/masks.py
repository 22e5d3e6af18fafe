"""Masks of single objects in COCO's notations, and bit-packed for the device.

A segmentation is a list of polygons (each a flat list x1, y1, x2, y2, ... in
pixels) or a run-length code {"size": [height, width], "counts"}, whose counts
are a list or pycocotools' compressed string. Runs go down the columns.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_rle

Segmentation = Sequence[Sequence[float]] | Mapping[str, Any]
Rle = Mapping[str, Any]
# Three corners; pycocotools would take a polygon of two for a box.
LEAST_NUMBERS = 6


def clean(segmentation: object) -> object:
  """A segmentation without polygons of fewer than three corners: no area."""
  if not isinstance(segmentation, list):
    return segmentation
  return [
    polygon
    for polygon in segmentation
    if not isinstance(polygon, list) or len(polygon) >= LEAST_NUMBERS
  ]


def fault(segmentation: object, height: int, width: int) -> str:
  """What is wrong with an annotation's segmentation, in words; '' if nothing.

  pycocotools itself crashes on some of these and draws beyond the image, or
  nothing at all, for others.

  Args:
    segmentation: as read from JSON, and `clean`.
    height: of its image.
    width: of its image.
  """
  if not segmentation:
    return "has no mask (its segmentation is missing or empty)"
  if isinstance(segmentation, dict):
    return _fault_of_rle(segmentation, [height, width])
  if not isinstance(segmentation, list):
    return f"has a segmentation of type {type(segmentation).__name__}"
  for polygon in segmentation:
    # Of whole lists at once: COCO has fifty million numbers.
    if (
      not isinstance(polygon, list)
      or not set(map(type, polygon)) <= {int, float}
      or not math.isfinite(sum(polygon))
    ):
      return f"has a polygon that is no list of numbers: {str(polygon)[:60]}"
    if len(polygon) % 2:
      return f"has a polygon of {len(polygon)} numbers, which are no pairs"
  return ""


def _fault_of_rle(rle: Rle, size: list[int]) -> str:
  counts = rle.get("counts")
  if rle.get("size") != size:
    return f"has a mask of size {rle.get('size')}, but its image {size}"
  if isinstance(counts, str):
    try:
      area = int(coco_rle.area({"size": size, "counts": counts.encode()}))
      coco_rle.decode({"size": size, "counts": counts.encode()})
    except ValueError as error:
      return f"has a run-length code that cannot be read: {error}"
    return "" if area <= size[0] * size[1] else "has runs beyond its image"
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
  """The mask of an object, bool [height, width]; pycocotools' pixels.

  Args:
    segmentation: polygons or run-length code that have no `fault`.
    height: of its image.
    width: of its image.
  """
  rle = segmentation
  if isinstance(segmentation, list):
    polygons = coco_rle.frPyObjects(segmentation, height, width)
    rle = coco_rle.merge(polygons)
  elif isinstance(segmentation["counts"], list):
    rle = coco_rle.frPyObjects(segmentation, height, width)
  return coco_rle.decode(rle).astype(bool)


def encode(masks: np.ndarray) -> list[dict[str, Any]]:
  """Compressed run-length codes of bool [N, H, W], ready for JSON."""
  # [H, W, N] in Fortran's order, one mask after the other.
  columns = np.ascontiguousarray(masks.swapaxes(1, 2)).view(np.uint8).T
  return [
    {
      "size": [int(side) for side in rle["size"]],
      "counts": rle["counts"].decode(),
    }
    for rle in coco_rle.encode(columns)
  ]


def pack(masks: np.ndarray, num_rows: int, side: int) -> np.ndarray:
  """Masks in a square buffer, eight pixels of a row in a byte.

  A ninth of the bytes that the images take otherwise travels to the device.

  Args:
    masks: bool [N, H, W], N <= num_rows and H, W <= side.
    num_rows: G.
    side: S in pixels.

  Returns:
    uint8 [G, S, ceil(S / 8)], numpy.packbits of the last axis; 0 outside.
  """
  packed = np.zeros((num_rows, side, -(-side // 8)), np.uint8)
  # Of rows read backwards packbits is ten times slower.
  bits = np.packbits(np.ascontiguousarray(masks), axis=-1)
  packed[: bits.shape[0], : bits.shape[1], : bits.shape[2]] = bits
  return packed


def unpack(packed: np.ndarray, height: int, width: int) -> np.ndarray:
  """Undoes `pack`: uint8 [G, S, ceil(S / 8)] -> bool [G, height, width]."""
  bits = np.unpackbits(packed, axis=-1)
  return bits[:, :height, :width].astype(bool)

"""A folder in COCO's layout with drawn images, and ways to damage it."""

import json
import pathlib
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_rle

# Height and width; the longest side of all is 70.
SIZES = ((48, 70), (64, 40), (33, 33))
CATEGORIES = {3: "disc", 7: "bar", 12: "never seen"}


def disc(height: int, width: int, y: float, x: float, radius: float):
  """Draws a disc, bool [height, width]."""
  rows, columns = np.mgrid[:height, :width]
  return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


def runs(mask: np.ndarray) -> list[int]:
  """Makes COCO's uncompressed counts without pycocotools."""
  flat = mask.ravel(order="F")
  changes = np.flatnonzero(np.diff(flat)) + 1
  ends = [0, *changes.tolist(), flat.size]
  counts = np.diff(ends).tolist()
  return [0, *counts] if flat[0] else counts


def box_of(mask: np.ndarray) -> list[int]:
  """Returns x, y, width and height of the pixels that are set."""
  rows, columns = np.nonzero(mask)
  x, y = int(columns.min()), int(rows.min())
  return [x, y, int(columns.max()) + 1 - x, int(rows.max()) + 1 - y]


def masks_of(index: int) -> list[np.ndarray]:
  """Draws the two discs of an image, which do not overlap."""
  height, width = SIZES[index]
  return [
    disc(height, width, height * 0.3, width * 0.25, 5 + index),
    disc(height, width, height * 0.7, width * 0.7, 8),
  ]


def annotations(index: int, first_id: int) -> list[dict[str, Any]]:
  """Makes two discs as plain and compressed runs, a polygon and a crowd."""
  height, width = SIZES[index]
  first, second = masks_of(index)
  compressed = coco_rle.encode(np.asfortranarray(second.astype(np.uint8)))
  crowd = disc(height, width, height - 1, 2, 4)
  shared = {"image_id": 10 + index, "iscrowd": 0}

  def with_mask(mask: np.ndarray, segmentation: Any, category: int):
    return {
      **shared,
      "category_id": category,
      "bbox": box_of(mask),
      "area": int(mask.sum()),
      "segmentation": segmentation,
    }

  size = [height, width]
  objects = [
    with_mask(first, {"size": size, "counts": runs(first)}, 3),
    with_mask(
      second, {"size": size, "counts": compressed["counts"].decode()}, 3
    ),
    {
      **shared,
      "category_id": 7,
      "bbox": [width - 12.5, 2.0, 9.5, 6.0],
      "area": 57.0,
      "segmentation": [
        [width - 12.5, 2, width - 3, 2, width - 3, 8, width - 12.5, 8]
      ],
    },
    with_mask(crowd, {"size": size, "counts": runs(crowd)}, 3) | {"iscrowd": 1},
  ]
  return [
    {**annotation, "id": first_id + number}
    for number, annotation in enumerate(objects)
  ]


def pixels(index: int) -> np.ndarray:
  """Draws the objects of an image on noise, uint8 [H, W, 3]."""
  height, width = SIZES[index]
  image = np.random.default_rng(index).integers(0, 60, (height, width, 3))
  for shade, mask in enumerate(masks_of(index)):
    image[mask] = 120 + 60 * shade
  return image.astype(np.uint8)


def write(folder: pathlib.Path) -> pathlib.Path:
  """Writes both splits with the same three images; returns the folder."""
  for split in ("train2017", "val2017"):
    (folder / split).mkdir(parents=True)
    for index in range(len(SIZES)):
      name = folder / split / f"{10 + index}.png"
      Image.fromarray(pixels(index)).save(name)
    content = {
      # Not in the order of ids, which must not matter.
      "images": [
        {
          "id": 10 + index,
          "file_name": f"{10 + index}.png",
          "height": height,
          "width": width,
        }
        for index, (height, width) in reversed(list(enumerate(SIZES)))
      ],
      "annotations": [
        annotation
        for index in range(len(SIZES))
        for annotation in annotations(index, 4 * index)
      ],
      "categories": [
        {"id": number, "name": name} for number, name in CATEGORIES.items()
      ],
    }
    path = folder / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
  return folder


def edit(folder: pathlib.Path, change, split: str = "train2017") -> None:
  """Applies `change` to the content of an annotation file."""
  path = folder / "annotations" / f"instances_{split}.json"
  content = json.loads(path.read_text())
  change(content)
  path.write_text(json.dumps(content))

"""Images and objects as the fields of a batch, all of one shape.

Images keep their own size, in the top left corner of a square uint8 buffer: the
network resizes and normalizes them on the device.
"""

import numpy as np
from etils import epath

from pqf_jax import errors
from pqf_jax.data import batching, decoding
from pqf_jax.data.coco import masks as coco_masks
from pqf_jax.data.coco import targets as coco_targets

# The network halves the image five times.
SIDE_MULTIPLE = 32


def read_image(path: epath.PathLike, *, annotated: bool) -> np.ndarray:
  """Reads an image file as uint8 [H, W, 3], see `decoding.open_image`.

  Raises:
    InputError: the file is missing, cannot be decoded or is refused.
  """
  try:
    data = decoding.read_file(path)
    return np.asarray(decoding.open_image(data, annotated=annotated))
  except decoding.DamagedError as error:
    raise errors.InputError(
      f"the image {path} cannot be decoded ({error}); copy it again or replace "
      "it"
    ) from error


def image_batch(path: epath.PathLike) -> batching.Batch:
  """Reads one image file as a batch like those of `data.eval_batches`.

  Its image_id is 0. The buffer's side is the image's longer one, rounded up to
  a multiple of `SIDE_MULTIPLE`.

  Raises:
    InputError: as `read_image`.
  """
  pixels = read_image(path, annotated=False)
  side = rounded_up(max(pixels.shape[:2]))
  row = image_fields(pixels, 0, side) | {"mask": np.float32(1)}
  return {name: value[None] for name, value in row.items()}


def rounded_up(side: int) -> int:
  """Returns the next multiple of `SIDE_MULTIPLE`."""
  return -(-side // SIDE_MULTIPLE) * SIDE_MULTIPLE


def mirror(
  pixels: np.ndarray, targets: coco_targets.Targets
) -> tuple[np.ndarray, coco_targets.Targets]:
  """Exchanges left and right of an image, uint8 [H, W, 3], and its objects."""
  x1, y1, x2, y2 = targets.boxes.T
  width = np.float32(pixels.shape[1])
  boxes = np.stack([width - x2, y1, width - x1, y2], axis=1)
  masks = targets.masks[:, :, ::-1]
  return pixels[:, ::-1], coco_targets.Targets(boxes, targets.labels, masks)


def image_fields(pixels: np.ndarray, image_id: int, side: int) -> batching.Row:
  """Returns the first three fields of `DetectionDataset.train_row`."""
  height, width = pixels.shape[:2]
  buffer = np.zeros((side, side, 3), np.uint8)
  buffer[:height, :width] = pixels
  return {
    "image": buffer,
    "size": np.array([height, width], np.int32),
    "image_id": np.int64(image_id),
  }


def target_fields(
  targets: coco_targets.Targets, num_objects: int, side: int
) -> batching.Row:
  """Returns the last four fields of `DetectionDataset.train_row`."""
  count = len(targets.labels)
  boxes = np.zeros((num_objects, 4), np.float32)
  labels = np.zeros(num_objects, np.int32)
  boxes[:count], labels[:count] = targets.boxes, targets.labels
  return {
    "boxes": boxes,
    "labels": labels,
    "valid": np.arange(num_objects) < count,
    "masks": coco_masks.to_bits(targets.masks, num_objects, side),
  }

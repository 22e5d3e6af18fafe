"""Images and objects as the fields of a batch, all of one shape.

Images keep their own size, in the top left corner of a square uint8 buffer: the
network resizes and normalizes them on the device.
"""

import numpy as np
from etils import epath
from PIL import Image

from pqf_jax import errors
from pqf_jax.data import batching, transforms
from pqf_jax.data.coco import masks as coco_masks
from pqf_jax.data.coco import targets as coco_targets

# The network halves the image five times.
SIDE_MULTIPLE = 32


def read_image(path: epath.PathLike) -> np.ndarray:
  """Reads an image file, also a gray or CMYK one, as uint8 [H, W, 3].

  Raises:
    InputError: the file is missing, cannot be decoded or has more than 8 bits.
  """
  path = epath.Path(path)
  try:
    with path.open("rb") as file, Image.open(file) as image:
      mode, pixels = image.mode, np.asarray(image.convert("RGB"))
  except FileNotFoundError as error:
    raise errors.InputError(f"the image {path} is missing") from error
  except transforms.DECODING_ERRORS as error:
    raise errors.InputError(
      f"the image {path} cannot be decoded ({error}); copy it again"
    ) from error
  if mode.startswith(("I", "F")):
    raise errors.InputError(
      f"{path} has pixels of more than 8 bits (Pillow's mode {mode}), which "
      "would be cut off; scale them to 0..255 and save the image again"
    )
  return pixels


def image_batch(path: epath.PathLike) -> batching.Batch:
  """Reads one image file as a batch like those of `data.eval_batches`.

  Its image_id is 0. The buffer's side is the image's longer one, rounded up to
  a multiple of `SIDE_MULTIPLE`.

  Raises:
    InputError: as `read_image`.
  """
  pixels = read_image(path)
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

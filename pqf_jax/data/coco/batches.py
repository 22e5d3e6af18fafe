"""Batches of a `coco.DetectionDataset`, all of one shape.

Images keep their own size, in the top left corner of a square uint8 buffer: the
network resizes and normalizes them on the device.
"""

from collections.abc import Iterator

import numpy as np
from etils import epath

from pqf_jax import errors
from pqf_jax.data import batching
from pqf_jax.data.coco import dataset as coco
from pqf_jax.data.coco import masks as coco_masks
from pqf_jax.data.coco import targets as coco_targets

FLIP_PROBABILITY = 0.5
# Random numbers for an image: whether it is mirrored.
NUM_DRAWS = 1
Batch = batching.Batch


def train_batches(
  dataset: coco.DetectionDataset,
  *,
  batch_size: int,
  seed: int,
  start_step: int = 0,
  num_steps: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[Batch]:
  """Yields images with their objects, mirrored half the time.

  Args:
    dataset: its `train` is read; S = side, G = num_objects.
    batch_size: images B a step, over all processes.
    seed: of order and mirroring.
    start_step: as in `batching.shuffled_batches`.
    num_steps: as in `batching.shuffled_batches`.
    process_index: as in `batching.shuffled_batches`.
    process_count: P.

  Returns:
    Batches with these fields, B here being B / P:
      image     uint8 [B, S, S, 3], 0 right of and below the image
      size      int32 [B, 2], its height and width
      image_id  int64 [B]
      boxes     float32 [B, G, 4], x1, y1, x2, y2 in pixels
      labels    int32 [B, G], from 1 on
      valid     bool [B, G]; boxes, labels and masks are 0 where it is False
      masks     uint8 [B, G, S, ceil(S / 8)], see `coco_masks.to_bits`

  Raises:
    InputError: the data set was opened without training images, the batch is
      larger than it, or P does not divide B; from the iterator: an image file
      is damaged.
  """
  split = dataset.train
  if split is None:
    raise errors.InputError(
      f"{dataset.name} was opened without its training images; load it with "
      "with_train=True"
    )

  def load(indices: np.ndarray, draws: np.ndarray) -> Batch:
    rows = []
    for index, draw in zip(indices.tolist(), draws[:, 0], strict=True):
      pixels, targets = split.pixels(index), split.targets(index)
      if draw < FLIP_PROBABILITY:
        pixels, targets = mirror(pixels, targets)
      image_id = split.images[index].id
      rows.append(
        _image_fields(pixels, image_id, dataset.side)
        | _target_fields(targets, dataset.num_objects, dataset.side)
      )
    return _stack(rows)

  return batching.shuffled_batches(
    load,
    len(split),
    num_draws=NUM_DRAWS,
    batch_size=batch_size,
    seed=seed,
    start_step=start_step,
    num_steps=num_steps,
    process_index=process_index,
    process_count=process_count,
  )


def eval_batches(
  dataset: coco.DetectionDataset,
  *,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[Batch]:
  """Yields the test images in the order of their ids.

  Args:
    dataset: its `test` is read.
    batch_size: as in `train_batches`.
    process_index: as in `train_batches`.
    process_count: as in `train_batches`.

  Returns:
    Batches of `image`, `size` and `image_id` as in `train_batches`, and `mask`
    float32 [B / P], 1 for an image and 0 for padding of the last batch.

  Raises:
    InputError: P does not divide B; from the iterator: an image file is
      damaged.
  """
  split = dataset.test

  def load(indices: np.ndarray, mask: np.ndarray) -> Batch:
    rows = [
      _image_fields(split.pixels(i), split.images[i].id, dataset.side)
      for i in indices.tolist()
    ]
    return _stack(rows) | {"mask": mask}

  return batching.ordered_batches(
    load,
    len(split),
    batch_size=batch_size,
    process_index=process_index,
    process_count=process_count,
  )


def image_batch(path: epath.PathLike) -> Batch:
  """Reads one image file as a batch of `eval_batches` with image_id 0.

  Args:
    path: of the image; the buffer's side is its longer one, rounded up to a
      multiple of 32.

  Raises:
    InputError: the file is missing or cannot be decoded.
  """
  pixels = coco.read_image(path)
  multiple = coco.SIDE_MULTIPLE
  side = -(-max(pixels.shape[:2]) // multiple) * multiple
  return _stack([_image_fields(pixels, 0, side)]) | {
    "mask": np.ones(1, np.float32)
  }


def mirror(
  pixels: np.ndarray, targets: coco_targets.Targets
) -> tuple[np.ndarray, coco_targets.Targets]:
  """Exchanges left and right of an image and its objects.

  Args:
    pixels: uint8 [H, W, 3].
    targets: of this image.
  """
  x1, y1, x2, y2 = targets.boxes.T
  width = np.float32(pixels.shape[1])
  boxes = np.stack([width - x2, y1, width - x1, y2], axis=1)
  masks = targets.masks[:, :, ::-1]
  return pixels[:, ::-1], coco_targets.Targets(boxes, targets.labels, masks)


def _image_fields(
  pixels: np.ndarray, image_id: int, side: int
) -> dict[str, np.ndarray]:
  height, width = pixels.shape[:2]
  buffer = np.zeros((side, side, 3), np.uint8)
  buffer[:height, :width] = pixels
  return {
    "image": buffer,
    "size": np.array([height, width], np.int32),
    "image_id": np.array(image_id, np.int64),
  }


def _target_fields(
  targets: coco_targets.Targets, num_rows: int, side: int
) -> dict[str, np.ndarray]:
  count = len(targets.labels)
  boxes = np.zeros((num_rows, 4), np.float32)
  labels = np.zeros(num_rows, np.int32)
  boxes[:count], labels[:count] = targets.boxes, targets.labels
  return {
    "boxes": boxes,
    "labels": labels,
    "valid": np.arange(num_rows) < count,
    "masks": coco_masks.to_bits(targets.masks, num_rows, side),
  }


def _stack(rows: list[dict[str, np.ndarray]]) -> Batch:
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

"""Objects of a COCO annotation file that a network is trained to find.

The choice is that of torchvision's reference training: no crowds, boxes clipped
to the image, no boxes without area, and no image whose boxes are all at most a
pixel wide or high.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pqf_jax import errors
from pqf_jax.data.coco import annotations
from pqf_jax.data.coco import masks as coco_masks

Box = tuple[np.float32, np.float32, np.float32, np.float32]


class Targets(NamedTuple):
  """The N objects of an image that a network is trained to find.

  Attributes:
    boxes: float32 [N, 4], x1, y1, x2, y2 in pixels; sides are positive.
    labels: int32 [N], from 1 on.
    masks: bool [N, H, W].
  """

  boxes: np.ndarray
  labels: np.ndarray
  masks: np.ndarray


def read_targets(
  image: annotations.AnnotatedImage, label_of: Mapping[int, int]
) -> Targets:
  """Returns the objects of an image; `label_of` is {category id: label}."""
  chosen = [
    (annotation, box)
    for annotation in image.annotations
    if (box := target_box(annotation, image)) is not None
  ]
  labels = [label_of[annotation["category_id"]] for annotation, _ in chosen]
  masks = [
    coco_masks.decode(annotation["segmentation"], image.height, image.width)
    for annotation, _ in chosen
  ]
  return Targets(
    np.array([box for _, box in chosen], np.float32).reshape(-1, 4),
    np.array(labels, np.int32),
    np.array(masks, bool).reshape(-1, image.height, image.width),
  )


def target_box(
  annotation: annotations.JsonObject, image: annotations.AnnotatedImage
) -> Box | None:
  """Returns x1, y1, x2, y2 within the image; None for crowds and empty boxes.

  Every step is in float32, as in torchvision.
  """
  if annotation["iscrowd"]:
    return None
  x, y, width, height = map(np.float32, annotation["bbox"])
  x1, x2 = _clip(x, image.width), _clip(x + width, image.width)
  y1, y2 = _clip(y, image.height), _clip(y + height, image.height)
  return (x1, y1, x2, y2) if x2 > x1 and y2 > y1 else None


def trainable_images(
  file: annotations.AnnotationFile,
) -> tuple[list[annotations.AnnotatedImage], tuple[str, ...]]:
  """Returns the images with objects, and sentences on what is left out.

  Raises:
    InputError: no image has an object to train on.
  """
  images: list[annotations.AnnotatedImage] = []
  num_empty, num_crowds = 0, 0
  for image in file.images:
    boxes = [target_box(annotation, image) for annotation in image.annotations]
    crowds = sum(a["iscrowd"] for a in image.annotations)
    num_crowds += crowds
    num_empty += boxes.count(None) - crowds
    # By the sides before clipping, as in torchvision's reference.
    if any(
      box is not None and min(annotation["bbox"][2:]) > 1
      for annotation, box in zip(image.annotations, boxes, strict=True)
    ):
      images.append(image)
  if not images:
    raise errors.InputError(
      f"{file.path}: none of its {len(file.images)} images has an object to "
      "train on, which is not a crowd and whose box is wider and higher than "
      "1 pixel; check its annotations"
    )
  left_out = {
    "images without an object to train on": len(file.images) - len(images),
    "crowd annotations": num_crowds,
    "boxes without area": num_empty,
  }
  return images, tuple(
    f"{file.path.name}: {count:,} {what} left out of the training"
    for what, count in left_out.items()
    if count
  )


def most_objects(
  file: annotations.AnnotationFile,
  images: Sequence[annotations.AnnotatedImage],
  num_objects: int | None,
) -> int:
  """Returns the largest number of targets in an image, or `num_objects`.

  Raises:
    InputError: an image has more than `num_objects`.
  """
  counts = [
    sum(target_box(a, image) is not None for a in image.annotations)
    for image in images
  ]
  most = max(counts)
  if num_objects and most > num_objects:
    image = images[counts.index(most)]
    raise errors.InputError(
      f"{image.file_name} of {file.path} has {most} objects, more than "
      f"config.data.num_objects {num_objects}; give {most} or more, or 0 for "
      "as many as are needed"
    )
  return num_objects or most


def _clip(value: np.float32, limit: int) -> np.float32:
  return min(max(value, np.float32(0)), np.float32(limit))

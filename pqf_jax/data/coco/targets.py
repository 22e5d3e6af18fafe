"""What of a COCO annotation file a network is trained to find.

As in torchvision's reference training: no crowds, boxes clipped to the image,
none without area, and no image whose boxes are all at most a pixel wide or
high.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pqf_jax import errors
from pqf_jax.data.coco import annotations
from pqf_jax.data.coco import masks as coco_masks


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
  """The objects of an image.

  Args:
    image: with its annotations.
    label_of: {category id: label}.
  """
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
    np.stack(masks)
    if masks
    else np.zeros((0, image.height, image.width), bool),
  )


def target_box(
  annotation: Mapping[str, Any], image: annotations.AnnotatedImage
) -> tuple[np.float32, ...] | None:
  """Corners within the image; None for crowds and where no area is left."""
  if annotation["iscrowd"]:
    return None
  # Float32 all along, as torchvision.
  x, y, width, height = map(np.float32, annotation["bbox"])
  x1, x2 = (min(max(v, 0), np.float32(image.width)) for v in (x, x + width))
  y1, y2 = (min(max(v, 0), np.float32(image.height)) for v in (y, y + height))
  return (x1, y1, x2, y2) if x2 > x1 and y2 > y1 else None


def trainable_images(
  file: annotations.AnnotationFile,
) -> tuple[list[annotations.AnnotatedImage], tuple[str, ...]]:
  """The images with something to learn, and sentences on what is left out.

  Raises:
    InputError: there is none.
  """
  images, num_empty, num_crowds = [], 0, 0
  for image in file.images:
    boxes = [target_box(annotation, image) for annotation in image.annotations]
    crowds = sum(bool(a["iscrowd"]) for a in image.annotations)
    num_crowds += crowds
    num_empty += boxes.count(None) - crowds
    # As torchvision's reference, by the sides before clipping.
    if any(
      box is not None and min(annotation["bbox"][2:]) > 1
      for annotation, box in zip(image.annotations, boxes, strict=True)
    ):
      images.append(image)
  if not images:
    raise errors.InputError(
      f"{file.path}: none of its {len(file.images)} images has an object to "
      "train on (no crowd, both sides of its box over 1 pixel)"
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
  """Targets of the image that has most of them, or `num_objects` if given.

  Raises:
    InputError: an image has more than that.
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

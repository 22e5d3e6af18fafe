"""The image files of detection data sets, and the buffer they fit into."""

from collections.abc import Iterable

import numpy as np
from etils import epath
from PIL import Image

from pqf_jax import errors
from pqf_jax.data import transforms
from pqf_jax.data.coco import annotations

# The network halves the image five times.
SIDE_MULTIPLE = 32
# Every image of a batch is padded to the largest: beyond this a few large ones
# would take gigabytes. COCO's have at most 640 pixels.
LARGEST_SIDE = 2048


def read_image(path: epath.PathLike) -> np.ndarray:
  """An image file as uint8 [H, W, 3], also a gray or CMYK one.

  Raises:
    InputError: it is missing, cannot be decoded or has more than 8 bits.
  """
  path = epath.Path(path)
  try:
    with path.open("rb") as file, Image.open(file) as image:
      mode, pixels = image.mode, np.asarray(image.convert("RGB"))
  except FileNotFoundError as error:
    raise errors.InputError(f"the image {path} is missing") from error
  except transforms.DAMAGED as error:
    raise errors.InputError(
      f"{path} is not an image that can be read, copy it again: {error}"
    ) from error
  if mode.startswith(("I", "F")):
    raise errors.InputError(
      f"{path} has pixels of more than 8 bits (mode {mode}), which would be "
      "cut off; scale them to 0..255 and save them again"
    )
  return pixels


def check_files(file: annotations.AnnotationFile, folder: epath.Path) -> None:
  """Refuses a folder that lacks images of an annotation file.

  Raises:
    InputError: names the first that is missing, and how many are.
  """
  if not folder.is_dir():
    raise errors.InputError(f"{folder} is missing, the images of {file.path}")
  # One listing instead of a question for each of COCO's 118,287 files.
  present = {path.name for path in folder.iterdir()}
  missing = [
    image
    for image in file.images
    if image.file_name not in present
    and not (folder / image.file_name).exists()
  ]
  if missing:
    raise errors.InputError(
      f"{folder / missing[0].file_name} is missing (image {missing[0].id} of "
      f"{file.path}); {len(missing)} of {len(file.images)} image files are not "
      "there: copy them again"
    )


def buffer_side(
  files: Iterable[annotations.AnnotationFile], image_size: int | None
) -> int:
  """Side S of a square that every image fits into, in pixels.

  Args:
    files: of all splits.
    image_size: S; None: that of the largest image, rounded up to a multiple of
      `SIDE_MULTIPLE`.

  Raises:
    InputError: names an image that is too large, and both sizes.
  """
  largest, file = max(
    ((image, file) for file in files for image in file.images),
    key=lambda pair: max(pair[0].height, pair[0].width),
  )
  pixels = max(largest.height, largest.width)
  what = (
    f"{largest.file_name} of {file.path} has {largest.height} x "
    f"{largest.width} pixels (height x width)"
  )
  if image_size and pixels > image_size:
    raise errors.InputError(
      f"{what}, which does not fit into config.data.image_size {image_size}; "
      f"give {pixels} or more, or 0 for as much as is needed"
    )
  if not image_size and pixels > LARGEST_SIDE:
    raise errors.InputError(
      f"{what}, and every image of a batch is padded to the largest; scale "
      f"images and annotations down to {LARGEST_SIDE} pixels, or take the "
      f"memory by --config.data.image_size={pixels}"
    )
  return image_size or -(-pixels // SIDE_MULTIPLE) * SIDE_MULTIPLE

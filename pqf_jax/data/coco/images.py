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
# Every image of a batch is padded to the largest: above this limit a few large
# ones would take gigabytes. COCO's have at most 640 pixels.
LARGEST_SIDE = 2048


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


def check_files(file: annotations.AnnotationFile, folder: epath.Path) -> None:
  """Refuses a folder that lacks images of an annotation file.

  Raises:
    InputError: the folder or an image is missing; names the first one.
  """
  if not folder.is_dir():
    raise errors.InputError(
      f"{folder}, the folder of the images of {file.path}, is missing"
    )
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
      f"{file.path}); copy {len(missing)} of the {len(file.images)} image "
      "files again"
    )


def buffer_side(
  files: Iterable[annotations.AnnotationFile], image_size: int | None
) -> int:
  """Returns the side S in pixels of a square that every image fits into.

  Args:
    files: of all splits.
    image_size: S; None: that of the largest image, rounded up to a multiple of
      `SIDE_MULTIPLE`.

  Raises:
    InputError: an image is too large; names it and both sizes.
  """
  largest, file = max(
    ((image, file) for file in files for image in file.images),
    key=lambda pair: max(pair[0].height, pair[0].width),
  )
  pixels = max(largest.height, largest.width)
  size = (
    f"{largest.file_name} of {file.path} has {largest.height} x "
    f"{largest.width} pixels (height x width)"
  )
  if image_size and pixels > image_size:
    raise errors.InputError(
      f"{size}, which does not fit into config.data.image_size {image_size}; "
      f"give {pixels} or more, or 0 for the size that is needed"
    )
  if not image_size and pixels > LARGEST_SIDE:
    raise errors.InputError(
      f"{size}, and every image of a batch is padded to the largest; scale "
      f"images and annotations down to {LARGEST_SIDE} pixels, or accept the "
      f"memory by --config.data.image_size={pixels}"
    )
  return image_size or -(-pixels // SIDE_MULTIPLE) * SIDE_MULTIPLE

"""Transforms of one image, and the normalization of a batch.

Resizing and crops are torchvision's on Pillow images, antialiased bilinear,
since the published accuracies were measured with them.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from pqf_jax import errors

# What may be done to a training image. A crop has a random place;
# 'random_resized_crop' a random size and shape too. A flip mirrors half of the
# images.
AUGMENTATIONS = (
  "none",
  "flip",
  "crop",
  "crop,flip",
  "random_resized_crop",
  "random_resized_crop,flip",
)
# Share of the area and width by height of a 'random_resized_crop', and how
# often they are drawn; torchvision's defaults.
AREA = (0.08, 1.0)
ASPECT = (3 / 4, 4 / 3)
ATTEMPTS = 10


class Preparation(NamedTuple):
  """What is done to an image before a network sees it.

  Attributes:
    resize: pixels of the short side, or of both sides of a square; 0: images
      stay as they are, and those smaller than the crop get black margins.
    crop: side S of what the network sees, in pixels.
    padding: black pixels at every side of a training image before its 'crop'.
    augmentation: one of `AUGMENTATIONS`, of training images; without a crop
      they are prepared as test images are.
  """

  resize: int | tuple[int, int]
  crop: int
  padding: int
  augmentation: str

  @property
  def num_draws(self) -> int:
    """The number of random numbers that `augment` takes."""
    return 2 * ATTEMPTS + 3 if self._resizes else 3

  def changed(
    self,
    *,
    resize: int | None = None,
    crop: int | None = None,
    padding: int | None = None,
    augmentation: str | None = None,
  ) -> Self:
    """Returns the preparation with other values; None leaves one as it is.

    Raises:
      InputError: the values do not fit each other; names the settings.
    """
    given: dict[str, Any] = {
      "resize": resize,
      "crop": crop,
      "augmentation": augmentation,
      "padding": padding,
    }
    new = self._replace(**{k: v for k, v in given.items() if v is not None})
    if not new._crops:
      if padding:
        raise errors.InputError(
          f"config.data.padding is {padding}, which only a random crop uses, "
          f"but config.data.augmentation is {new.augmentation!r}; give 'crop' "
          "or 'crop,flip', or no padding"
        )
      new = new._replace(padding=0)
    if padding is not None and padding >= new.crop:
      raise errors.InputError(
        f"config.data.padding is {padding}, so that crops of {new.crop} pixels "
        "may hold nothing of the image; give less than the crop"
      )
    side = min(new.resize) if isinstance(new.resize, tuple) else new.resize
    if 0 < side < new.crop:
      raise errors.InputError(
        f"config.data.crop is {new.crop}, but images are resized to {side} "
        f"pixels; give config.data.resize={new.crop} or more, or 0 to leave "
        "images as they are"
      )
    return new

  def for_training(self, image: Image.Image) -> Image.Image:
    """Returns a training image as `augment` takes it."""
    if self._resizes:
      return image
    return self._resized(image) if self._crops else self.for_test(image)

  def for_test(self, image: Image.Image) -> Image.Image:
    """Returns the middle of a test image, S x S."""
    return center_crop(self._resized(image), self.crop)

  def augment(self, image: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Augments what `for_training` returned.

    Args:
      image: uint8 [H, W, 3].
      draws: float64 [num_draws] in [0, 1).

    Returns:
      uint8 [S, S, 3].
    """
    if self._resizes:
      image = random_resized_crop(image, draws[:-1], size=self.crop)
      draws = np.array([0, 0, draws[-1]])  # it only remains to mirror it
    return random_crop(
      image,
      draws,
      size=self.crop,
      padding=self.padding,
      flip_probability=0.5 if "flip" in self.augmentation else 0.0,
    )

  @property
  def _resizes(self) -> bool:
    return self.augmentation.startswith("random_resized_crop")

  @property
  def _crops(self) -> bool:
    return self.augmentation.startswith("crop")

  def _resized(self, image: Image.Image) -> Image.Image:
    if isinstance(self.resize, tuple):
      height, width = self.resize
      return image.resize((width, height), Image.Resampling.BILINEAR)
    return resize_short_side(image, self.resize) if self.resize else image


def resize_short_side(image: Image.Image, size: int) -> Image.Image:
  """Resizes the shorter side to `size`; the longer one is rounded down."""
  width, height = image.size
  short = min(width, height)
  new_size = (size * width // short, size * height // short)
  return image.resize(new_size, Image.Resampling.BILINEAR)


def center_crop(image: Image.Image, size: int) -> Image.Image:
  """Cuts `size` x `size` pixels out of the middle of an image.

  A smaller one gets black margins.
  """
  # As torchvision does: Python's round, half to even, and of an odd number of
  # missing pixels the larger part at the end.
  left, top = (
    round((side - size) / 2) if side >= size else -((size - side) // 2)
    for side in image.size
  )
  return image.crop((left, top, left + size, top + size))


def random_crop(
  image: np.ndarray,
  draws: np.ndarray,
  *,
  size: int,
  padding: int,
  flip_probability: float,
) -> np.ndarray:
  """Cuts a square out of a padded image and perhaps mirrors it.

  Args:
    image: uint8 [H, W, 3].
    draws: float64 [3] in [0, 1): place of the crop's first row and of its first
      column among all possible ones, and whether it is mirrored.
    size: side S of the square.
    padding: black pixels added at every side; where the image is still smaller
      than the square, it also gets what is missing on both sides, as by
      torchvision's `pad_if_needed`.
    flip_probability: 0 where left and right matter, as in digits.

  Returns:
    uint8 [S, S, 3].
  """
  height, width, channels = image.shape
  above, before = (
    padding + max(0, size - side - 2 * padding) for side in (height, width)
  )
  if above or before:
    # Twice as fast as np.pad, which would be most of the time of a batch.
    padded = np.zeros(
      (height + 2 * above, width + 2 * before, channels), np.uint8
    )
    padded[above : above + height, before : before + width] = image
    image = padded
  top = int(draws[0] * (image.shape[0] - size + 1))
  left = int(draws[1] * (image.shape[1] - size + 1))
  crop = image[top : top + size, left : left + size]
  if draws[2] >= flip_probability:
    return crop
  # Pixels as one item each: 2.5 times as fast as mirroring single bytes.
  pixels = crop.view(f"V{channels}")[:, ::-1]
  return np.ascontiguousarray(pixels).view(np.uint8)


def random_resized_crop(
  image: np.ndarray, draws: np.ndarray, *, size: int
) -> np.ndarray:
  """Cuts a part of random size and shape out of an image, and resizes it.

  It is torchvision's `RandomResizedCrop` with its defaults.

  Args:
    image: uint8 [H, W, 3].
    draws: float64 [2 * ATTEMPTS + 2] in [0, 1): area and shape of every
      attempt, then the place of the part's first row and of its first column.
    size: side S of the result.

  Returns:
    uint8 [S, S, 3].
  """
  height, width = image.shape[:2]
  low, high = map(math.log, ASPECT)
  for area_draw, shape_draw in draws[:-2].reshape(ATTEMPTS, 2):
    area = height * width * (AREA[0] + area_draw * (AREA[1] - AREA[0]))
    aspect = math.exp(low + shape_draw * (high - low))
    columns = round(math.sqrt(area * aspect))
    rows = round(math.sqrt(area / aspect))
    if 0 < columns <= width and 0 < rows <= height:
      top = int(draws[-2] * (height - rows + 1))
      left = int(draws[-1] * (width - columns + 1))
      break
  else:  # the largest part of such a shape in the middle
    rows = min(height, round(width / ASPECT[0]))
    columns = min(width, round(height * ASPECT[1]))
    top, left = (height - rows) // 2, (width - columns) // 2
  part = Image.fromarray(image[top : top + rows, left : left + columns])
  return np.asarray(part.resize((size, size), Image.Resampling.BILINEAR))


def normalize(
  images: jax.Array, mean: Sequence[float], std: Sequence[float]
) -> jax.Array:
  """Computes (images / 255 - mean) / std.

  It runs on the device, since uint8 images are a quarter of the bytes to
  transfer.

  Args:
    images: uint8 [..., 3].
    mean: [3], see `ImageDataset`.
    std: [3].

  Returns:
    float32 of the same shape.
  """
  shape = (1,) * (images.ndim - 1) + (3,)
  center, scale = (
    jnp.asarray(values, jnp.float32).reshape(shape) for values in (mean, std)
  )
  return (jnp.asarray(images, jnp.float32) / 255 - center) / scale

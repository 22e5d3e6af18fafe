"""Transforms of one image, and the normalization of a batch.

Resizing and center crop are torchvision's on Pillow images, antialiased
bilinear, since the published accuracies were measured with them.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image


def resize(image: Image.Image, size: int) -> Image.Image:
  """Resizes an image to a square of `size` pixels."""
  return image.resize((size, size), Image.Resampling.BILINEAR)


def resize_short_side(image: Image.Image, size: int) -> Image.Image:
  """Resizes the shorter side to `size`; the longer one is rounded down."""
  width, height = image.size
  short = min(width, height)
  new_size = (size * width // short, size * height // short)
  return image.resize(new_size, Image.Resampling.BILINEAR)


def center_crop(image: Image.Image, size: int) -> Image.Image:
  """Cuts `size` x `size` pixels out of the middle of an image."""
  # Python's round, half to even, as torchvision does.
  left, top = (round((side - size) / 2) for side in image.size)
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
    size: side S of the square, at most H and W plus twice the padding.
    padding: black pixels added at every side.
    flip_probability: 0 where left and right matter, as in digits.

  Returns:
    uint8 [S, S, 3].
  """
  height, width, channels = image.shape
  if padding:
    # Twice as fast as np.pad, which would be most of the time of a batch.
    padded = np.zeros(
      (height + 2 * padding, width + 2 * padding, channels), np.uint8
    )
    padded[padding : padding + height, padding : padding + width] = image
    image = padded
  top = int(draws[0] * (image.shape[0] - size + 1))
  left = int(draws[1] * (image.shape[1] - size + 1))
  crop = image[top : top + size, left : left + size]
  if draws[2] >= flip_probability:
    return crop
  # Pixels as one item each: 2.5 times as fast as mirroring single bytes.
  pixels = crop.view(f"V{channels}")[:, ::-1]
  return np.ascontiguousarray(pixels).view(np.uint8)


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

"""Data sets of photographs, of any size and decoded as they are read."""

import functools
from typing import Protocol

from PIL import Image

from pqf_jax.data import decoding, sources, transforms


class Copy(Protocol):
  """A copy of a data set on this machine, in whatever form."""

  @property
  def num_classes(self) -> int:
    """Labels are below."""
    ...

  def split(self, name: str) -> decoding.EncodedImages:
    """The images of `train` or `validation`."""
    ...


def make_dataset(
  name: str, copy: Copy, image_size: int | None
) -> sources.ImageDataset:
  """Short side 256, crop 224, both scaled with `image_size`.

  Training crops lie anywhere and are mirrored half the time (section 4.1 of
  arXiv 2010.15703); the test crop is in the center. Mean and standard deviation
  are ImageNet's.
  """
  size = image_size or 224
  shorten = functools.partial(
    transforms.resize_short_side, size=size * 256 // 224
  )

  def middle(image: Image.Image) -> Image.Image:
    return transforms.center_crop(shorten(image), size)

  return sources.ImageDataset(
    name=name,
    train=decoding.for_training(copy.split("train"), copy.num_classes, shorten),
    test=decoding.for_test(copy.split("validation"), copy.num_classes, middle),
    num_classes=copy.num_classes,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    augment=functools.partial(
      transforms.random_crop, size=size, padding=0, flip_probability=0.5
    ),
  )

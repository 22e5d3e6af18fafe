"""Handwritten digits of the UCI repository, which come with scikit-learn.

1,797 gray images of 8 x 8 pixels; a fifth of every class is held out.
"""

import functools

import numpy as np
from PIL import Image
from sklearn import datasets, model_selection

from pqf_jax.data import sources, transforms

IMAGE_SIZE = 32
MAX_INK = 16
TEST_SHARE = 0.2
# Over the training images at 32 pixels, all three channels being equal.
MEAN, STD = 0.3057, 0.3235


def load(data_dir: str | None, image_size: int | None) -> sources.ImageDataset:
  """Opens 1,437 training and 360 test images; `data_dir` is not needed."""
  del data_dir
  size = image_size or IMAGE_SIZE
  ink, labels = datasets.load_digits(return_X_y=True)
  sources.check_memory("digits", len(labels), size)
  pixels = np.rint(ink * (255 / MAX_INK)).astype(np.uint8).reshape(-1, 8, 8)
  images = (Image.fromarray(image).convert("RGB") for image in pixels)
  records = [
    {"image": np.asarray(transforms.resize(image, size)), "label": int(label)}
    for image, label in zip(images, labels, strict=True)
  ]
  train, test = model_selection.train_test_split(
    records, test_size=TEST_SHARE, random_state=0, stratify=labels
  )
  return sources.ImageDataset(
    name="digits",
    train=train,
    test=test,
    num_classes=10,
    mean=(MEAN,) * 3,
    std=(STD,) * 3,
    # Half a pixel of the scan; a whole one would cut strokes off.
    augment=functools.partial(
      transforms.random_crop,
      size=size,
      padding=size // 16,
      flip_probability=0.0,
    ),
    prepare=functools.partial(transforms.resize, size=size),
  )

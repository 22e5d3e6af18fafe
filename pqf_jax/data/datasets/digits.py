"""Handwritten digits of the UCI repository, which come with scikit-learn.

1,797 gray images of 8 x 8 pixels; a fifth of every class is held out.
"""

import functools

import numpy as np
from PIL import Image
from sklearn import datasets, model_selection

from pqf_jax import errors
from pqf_jax.data import sources, transforms

IMAGE_SIZE = 32
MAX_INK = 16
TEST_SHARE = 0.2
# Over the training images at 32 pixels, all three channels being equal.
MEAN, STD = 0.3057, 0.3235


def load(data_dir: str | None, image_size: int | None) -> sources.ImageDataset:
  """Opens 1,437 training and 360 test images, which come with scikit-learn.

  Raises:
    InputError: `data_dir` is given.
  """
  if data_dir:
    raise errors.InputError(
      f"config.data.dir is {data_dir!r}, but config.data.name 'digits', which "
      "come with scikit-learn; give the name of the data there, or no folder"
    )
  size = image_size or IMAGE_SIZE
  ink, labels = datasets.load_digits(return_X_y=True)
  pixels = np.rint(ink * (255 / MAX_INK)).astype(np.uint8).reshape(-1, 8, 8)
  images = [Image.fromarray(image).convert("RGB") for image in pixels]
  train, test = model_selection.train_test_split(
    list(zip(images, labels.tolist(), strict=True)),
    test_size=TEST_SHARE,
    random_state=0,
    stratify=labels,
  )
  return sources.prepare_images(
    # Half a pixel of the scan; a whole one would cut strokes off.
    transforms.Preparation((size, size), size, size // 16, "crop"),
    name="digits",
    train=functools.partial(_records, train),
    test=functools.partial(_records, test),
    num_classes=10,
    mean=(MEAN,) * 3,
    std=(STD,) * 3,
    num_in_memory=len(labels),
  )


def _records(
  images: list[tuple[Image.Image, int]], transform: sources.Transform
) -> list[sources.Record]:
  return [
    {"image": np.asarray(transform(image)), "label": label}
    for image, label in images
  ]

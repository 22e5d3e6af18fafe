"""ImageNet (ILSVRC 2012), prepared by tensorflow-datasets or in folders."""

import functools

from PIL import Image

from pqf_jax.data import decoding, locate, sources, transforms
from pqf_jax.data.datasets import imagenet_labels

PREPARE_COMMAND = (
  "python -m pqf_jax.data.prepare imagenet2012 --from TARS --to {data_dir} "
  "where TARS holds ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar"
)


def load(data_dir: str | None, image_size: int | None) -> sources.ImageDataset:
  """Opens ImageNet, with the sizes and crops of `make_dataset`."""
  copy = locate.open_copy(
    "imagenet2012",
    data_dir,
    prepare_command=PREPARE_COMMAND,
    class_names=imagenet_labels.class_names(),
  )
  return make_dataset("imagenet2012", copy, image_size)


def make_dataset(
  name: str, copy: decoding.EncodedDataset, image_size: int | None
) -> sources.ImageDataset:
  """Resizes the short side to 256 and crops 224, both scaled by `image_size`.

  Training crops lie anywhere and are mirrored half the time (section 4.1 of
  arXiv 2010.15703); the test crop is in the center. Mean and standard deviation
  are ImageNet's. Images are decoded each time they are read.

  Args:
    name: of the data set.
    copy: with the splits `train` and `validation`.
    image_size: side of the crops in pixels; None: 224.
  """
  size = image_size or 224
  shorten = functools.partial(
    transforms.resize_short_side, size=size * 256 // 224
  )

  def crop_center(image: Image.Image) -> Image.Image:
    return transforms.center_crop(shorten(image), size)

  return sources.ImageDataset(
    name=name,
    train=decoding.for_training(copy.split("train"), copy.num_classes, shorten),
    test=decoding.Records(
      copy.split("validation"), copy.num_classes, crop_center
    ),
    num_classes=copy.num_classes,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    augment=functools.partial(
      transforms.random_crop, size=size, padding=0, flip_probability=0.5
    ),
    prepare=shorten,
  )

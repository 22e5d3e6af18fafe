"""ImageNet (ILSVRC 2012), decoded as it is read."""

import functools

from PIL import Image

from pqf_jax.data import sources, tfds_folder, transforms

PREPARE = (
  'python -c "import tensorflow_datasets as tfds; '
  "tfds.builder('imagenet2012', data_dir='{data_dir}', "
  "file_format='array_record').download_and_prepare("
  "download_config=tfds.download.DownloadConfig("
  "manual_dir='TARS'))\" where the folder TARS holds ILSVRC2012_img_train.tar"
  " and ILSVRC2012_img_val.tar"
)


def load(data_dir: str | None, image_size: int | None) -> sources.ImageDataset:
  """Short side 256, crop 224, both scaled with `image_size`.

  Training crops lie anywhere and are mirrored half the time (section 4.1 of
  arXiv 2010.15703); the test crop is in the center.
  See `pqf_jax.data.get_dataset`.
  """
  size = image_size or 224
  folder = tfds_folder.open_folder("imagenet2012", data_dir, prepare=PREPARE)
  shorten = functools.partial(
    transforms.resize_short_side, size=size * 256 // 224
  )

  def middle(image: Image.Image) -> Image.Image:
    return transforms.center_crop(shorten(image), size)

  return sources.ImageDataset(
    name="imagenet2012",
    train=folder.split("train", shorten),
    test=folder.split("validation", middle),
    num_classes=folder.num_classes,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    augment=functools.partial(
      transforms.random_crop, size=size, padding=0, flip_probability=0.5
    ),
  )

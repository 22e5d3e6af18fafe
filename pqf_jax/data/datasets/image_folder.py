"""Your own photographs: DIR/train/CLASS/* and DIR/val/CLASS/*."""

from pqf_jax.data import locate, sources
from pqf_jax.data.datasets import imagenet_transforms


def load(data_dir: str | None, image_size: int | None) -> sources.ImageDataset:
  """Opens a data set with one class for each folder in `train`.

  Images are resized and cropped by `imagenet_transforms.make_dataset`.
  """
  return imagenet_transforms.make_dataset(
    "image_folder", locate.open_image_folder(data_dir), image_size
  )

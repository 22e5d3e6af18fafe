"""Your own photographs: DIR/train/CLASS/* and DIR/val/CLASS/*."""

from pqf_jax.data import locate, sources
from pqf_jax.data.datasets import imagenet2012


def load(data_dir: str | None, image_size: int | None) -> sources.ImageDataset:
  """Opens folders of images, which are resized and cropped as ImageNet's."""
  copy = locate.open_copy("image_folder", data_dir, class_names=())
  return imagenet2012.make_dataset("image_folder", copy, image_size)

"""Your own photographs: DIR/train/CLASS/* and DIR/val/CLASS/*."""

from pqf_jax import errors
from pqf_jax.data import locate, sources
from pqf_jax.data.datasets import photos


def load(data_dir: str | None, image_size: int | None) -> sources.ImageDataset:
  """As many classes as `train` has folders; see `photos.make_dataset`."""
  if not data_dir:
    raise errors.InputError(
      "image_folder needs data_dir (--config.data.dir), the folder that holds "
      "train/CLASS and val/CLASS with the images"
    )
  return photos.make_dataset(
    "image_folder", locate.open_image_folder(data_dir), image_size
  )

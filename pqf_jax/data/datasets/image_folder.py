"""Your own images: DIR/train/CLASS/* and DIR/val/CLASS/*."""

from pqf_jax.data import locate, photographs, sources


def load(data_dir: str | None, image_size: int | None) -> sources.ImageDataset:
  """Opens folders of images; see `photographs.fitting`."""
  copy = locate.open_copy(
    "image_folder", data_dir, layout=locate.image_folders()
  )
  train, test = copy.split("train"), copy.split("validation")
  return photographs.make_dataset(
    "image_folder",
    train,
    test,
    copy.num_classes,
    photographs.fitting(train, image_size),
  )

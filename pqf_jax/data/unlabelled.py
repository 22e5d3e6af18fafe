"""Images without labels in the place of a data set's training images."""

from typing import Any

from pqf_jax import errors
from pqf_jax.data import decoding, sources
from pqf_jax.data.formats import image_files

# No class has this number.
LABEL = -1


class Unlabelled:
  """The images of a source, without their labels."""

  def __init__(self, images: sources.Source) -> None:
    self._images = images

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {"image": self._images[index]["image"], "label": LABEL}


def use_unlabelled(
  dataset: sources.ImageDataset, folder: str
) -> sources.ImageDataset:
  """Returns the data set with the images of a folder for training.

  Images in folders below are taken too; damaged ones are replaced as those of
  any training set. They are resized and augmented as the data set's own.

  Args:
    dataset: keeps its test images.
    folder: holds the images.

  Raises:
    InputError: the folder is missing or holds no images, or the data set does
      not say how its training images are resized.
  """
  if dataset.prepare is None:
    raise errors.InputError(
      f"data set {dataset.name!r} has no `prepare`, which resizes the images "
      f"of config.data.unlabelled={folder}; add it to its ImageDataset"
    )
  images = decoding.for_training(
    image_files.unlabelled_images(folder), dataset.num_classes, dataset.prepare
  )
  return dataset._replace(train=Unlabelled(images))

"""Labelled images, and loaders that make batches of them.

A data set is a function, or a module that has it under the name `load`:

    load(data_dir, image_size) -> ImageDataset

`register(name, function_or_module)`, or an entry point of the group
'pqf_jax.datasets', adds one from outside of this package. Its module, and with
it the library that reads its files, is imported when it is asked for.
"""

from collections.abc import Callable

from pqf_jax import registry
from pqf_jax.data.batching import eval_batches, fingerprint, train_batches
from pqf_jax.data.sources import (
  ImageDataset,
  preparation_changes,
  prepare_images,
  prepare_otherwise,
)
from pqf_jax.data.transforms import Preparation, normalize
from pqf_jax.data.unlabelled import use_unlabelled

__all__ = [
  "DATASETS",
  "ImageDataset",
  "Preparation",
  "eval_batches",
  "fingerprint",
  "get_dataset",
  "normalize",
  "prepare_images",
  "prepare_otherwise",
  "preparation_changes",
  "register",
  "train_batches",
  "use_unlabelled",
  "usual_size",
]

Loader = Callable[[str | None, int | None], ImageDataset]

DATASETS = registry.Registry(
  "data set",
  {
    "cifar10": "pqf_jax.data.datasets.cifar10",
    "digits": "pqf_jax.data.datasets.digits",
    "image_folder": "pqf_jax.data.datasets.image_folder",
    "imagenet2012": "pqf_jax.data.datasets.imagenet2012",
  },
  entry_points="pqf_jax.datasets",
)
register = DATASETS.register
# Any data set of tensorflow-datasets: this and its name there.
TFDS = "tfds:"


def usual_size(name: str) -> int:
  """Returns the side of a data set's images where a config gives none.

  It is the module's `IMAGE_SIZE`, or 224 where the data set states none.
  """
  dataset = None if name.startswith(TFDS) else DATASETS.get(name)
  return getattr(dataset, "IMAGE_SIZE", 224)


def get_dataset(
  name: str, *, data_dir: str | None = None, image_size: int | None = None
) -> ImageDataset:
  """Opens a data set that is on this machine; nothing is downloaded.

  Args:
    name: a name in `DATASETS`, or 'tfds:NAME' of any data set of image
      classification that tensorflow-datasets has prepared.
    data_dir: the folder that holds `<name>/<version>/dataset_info.json`, or
      for `imagenet2012` and `image_folder` one that holds `train/CLASS` and
      `val/CLASS` with the images, for `cifar10` its archive; `digits` needs
      none.
    image_size: side of the images in pixels; None: 32 for `cifar10` and
      `digits`, 224 for `imagenet2012`, and for the others of this package too,
      unless their images are smaller.

  Raises:
    InputError: no data set has this name, or its files are missing; the
      message says how to prepare them.
  """
  if name.startswith(TFDS):
    from pqf_jax.data.datasets import tfds_images  # imports its library

    return tfds_images.load(name.removeprefix(TFDS), data_dir, image_size)
  dataset = DATASETS.get(name)
  load: Loader = getattr(dataset, "load", dataset)
  return load(data_dir, image_size)

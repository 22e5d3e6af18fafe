"""Data sets, one file each, and the loaders that make batches of them.

A data set is a module with one function:

    load(data_dir, image_size) -> ImageDataset

Its module, and with it the library that reads its files, is imported when the
data set is asked for.
"""

import difflib
import importlib

from pqf_jax import errors
from pqf_jax.data.loaders import eval_batches, train_batches
from pqf_jax.data.sources import ImageDataset
from pqf_jax.data.transforms import normalize

__all__ = [
  "DATASETS",
  "ImageDataset",
  "eval_batches",
  "get_dataset",
  "normalize",
  "train_batches",
]

DATASETS = {
  "cifar10": "pqf_jax.data.datasets.cifar10",
  "digits": "pqf_jax.data.datasets.digits",
  "image_folder": "pqf_jax.data.datasets.image_folder",
  "imagenet2012": "pqf_jax.data.datasets.imagenet2012",
}


def get_dataset(
  name: str, *, data_dir: str | None = None, image_size: int | None = None
) -> ImageDataset:
  """Opens a data set that is on this machine; nothing is downloaded.

  Args:
    name: a key of `DATASETS`.
    data_dir: the folder that holds `<name>/<version>/dataset_info.json`, or
      for `imagenet2012` and `image_folder` one that holds `train/CLASS` and
      `val/CLASS` with the images; `digits` needs none.
    image_size: side of the images in pixels; None: 32 for `cifar10` and
      `digits`, else 224.

  Raises:
    InputError: no data set has this name, or its files are not there; the
      message says how to prepare them.
  """
  if name not in DATASETS:
    near = difflib.get_close_matches(name, DATASETS, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise errors.InputError(
      f"no data set is named {name!r}: {hint}there are "
      f"{', '.join(sorted(DATASETS))}"
    )
  module = importlib.import_module(DATASETS[name])
  return module.load(data_dir, image_size)

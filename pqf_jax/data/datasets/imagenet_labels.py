"""Class names of ImageNet (ILSVRC 2012), and labels of its validation images.

Labels are the numbers of the sorted WordNet ids. Both lists come with
tensorflow-datasets, whose package is not imported for them (3 s).
"""

import functools
import importlib.util
import pathlib
import re

from pqf_jax import errors

_VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


def class_names() -> tuple[str, ...]:
  """Returns the 1,000 WordNet ids in the order of the labels."""
  return _read("labels.txt")


def validation_label(file_name: str) -> int:
  """Returns the label of an image of ILSVRC2012_img_val.tar.

  The archive itself holds no labels.

  Args:
    file_name: without folders.

  Raises:
    InputError: the name is not one of the 50,000.
  """
  match = _VALIDATION_NAME.fullmatch(file_name)
  number = int(match[1]) if match else 0
  names = _read("validation_labels.txt")
  if not 1 <= number <= len(names):
    raise errors.InputError(
      f"{file_name} is not the name of an ImageNet validation image, "
      f"ILSVRC2012_val_00000001.JPEG to {len(names):08d}, so that its label is "
      "not known; put the images into folders val/CLASS"
    )
  return class_names().index(names[number - 1])


@functools.cache
def _read(file_name: str) -> tuple[str, ...]:
  spec = importlib.util.find_spec("tensorflow_datasets")
  if spec is None or not spec.submodule_search_locations:
    raise ModuleNotFoundError("tensorflow-datasets is not installed")
  package = pathlib.Path(spec.submodule_search_locations[0])
  file = package / "datasets" / "imagenet2012" / file_name
  return tuple(file.read_text().split())

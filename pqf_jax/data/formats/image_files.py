"""Images in folders of classes, DIR/train/CLASS/* and DIR/val/CLASS/*.

This is the layout of PyTorch's examples. Labels are the numbers of the sorted
names of the folders in `train`; images are numbered by class, then by file
name.
"""

import concurrent.futures
import difflib
import itertools
import os
import pathlib
from collections.abc import Callable, Sequence

from pqf_jax import errors
from pqf_jax.data import decoding

# Those of torchvision's ImageFolder, in small or capital letters.
SUFFIXES = (
  ".jpg",
  ".jpeg",
  ".png",
  ".ppm",
  ".bmp",
  ".pgm",
  ".tif",
  ".tiff",
  ".webp",
)
TEST_FOLDERS = ("val", "validation")
NUM_THREADS = 32


class Images(decoding.EncodedImages):
  """The image files of one split."""

  def __init__(self, paths: Sequence[str], labels: Sequence[int]) -> None:
    self.paths = paths
    self.labels = labels

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, index: int) -> decoding.EncodedImage:
    with open(self.paths[index], "rb") as file:
      return decoding.EncodedImage(file.read(), self.labels[index])

  def place(self, index: int) -> str:
    """Returns the path of the file."""
    return self.paths[index]


class Folder(decoding.EncodedDataset):
  """A folder with images of both splits."""

  def __init__(
    self, top: pathlib.Path, class_names: Sequence[str] = ()
  ) -> None:
    """Reads the names of the classes.

    Args:
      top: holds `train`, and `val` or `validation`.
      class_names: the classes that must be in `train`; (): any.

    Raises:
      InputError: a folder is missing, or the classes are not those expected.
    """
    self._train = top / "train"
    tests = [top / name for name in TEST_FOLDERS if (top / name).is_dir()]
    if not self._train.is_dir() or not tests:
      has, lacks = ("train", "val") if not tests else (tests[0].name, "train")
      raise errors.InputError(
        f"{top} has a folder {has}, but no folder {lacks}; put the images into "
        "train/CLASS and val/CLASS"
      )
    self._test = tests[0]
    self.class_names = _folders(self._train)
    if class_names:
      _check_classes(self._train, self.class_names, class_names)

  @property
  def num_classes(self) -> int:
    """The number of folders in `train`."""
    return len(self.class_names)

  def flat_test_files(self) -> list[str]:
    """Returns the images in `val` itself, if it has no folders of classes."""
    return [] if _folders(self._test) else _images(self._test)

  def split(self, name: str) -> Images:
    """Returns the images of `train`, or for any other name those of `val`.

    Raises:
      InputError: there are no images, or some of a class that `train` lacks.
    """
    folder = self._train if name == "train" else self._test
    class_names = _folders(folder)
    if not class_names:
      inside = next((entry.name for entry in os.scandir(folder)), None)
      raise errors.InputError(
        f"{folder} has no folders of classes, "
        + (f"only files such as {inside}" if inside else "it is empty")
        + f": put the images into {folder.name}/CLASS. For ImageNet, whose "
        "validation images have their labels by their names, run python -m "
        f"pqf_jax.data.prepare imagenet2012 --from {folder.parent} --to DIR"
      )
    unknown = sorted(set(class_names) - set(self.class_names))
    if unknown:
      near = difflib.get_close_matches(unknown[0], self.class_names, 1)
      raise errors.InputError(
        f"{folder / unknown[0]} is a class that {self._train} does not have"
        + (f" (it has {near[0]})" if near else "")
        + f"; rename or remove {len(unknown)} such folder(s)"
      )
    with concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as pool:
      paths = list(pool.map(_images, [folder / name for name in class_names]))
    images = dict(zip(class_names, paths, strict=True))
    empty = [name for name in class_names if not images[name]]
    if empty and name == "train" or len(empty) == len(class_names):
      raise errors.InputError(
        f"{folder / empty[0]} holds no images (files that end in "
        f"{' '.join(SUFFIXES)}); complete or remove it"
      )
    label = {name: number for number, name in enumerate(self.class_names)}
    labels = [label[name] for name in class_names for _ in images[name]]
    return Images(list(itertools.chain(*paths)), labels)


def _check_classes(
  folder: pathlib.Path, class_names: Sequence[str], expected: Sequence[str]
) -> None:
  """Refuses other classes: a missing one would shift the labels after it."""
  missing = sorted(set(expected) - set(class_names))
  extra = sorted(set(class_names) - set(expected))
  if not missing and not extra:
    return
  differences = [
    f"{len(names)} {what} ({names[0]}{', ...' if names[1:] else ''})"
    for names, what in ((missing, "missing"), (extra, "unknown"))
    if names
  ]
  raise errors.InputError(
    f"{folder} has {len(class_names)} folders of classes, but must have the "
    f"{len(expected)} classes {expected[0]} to {expected[-1]}: "
    f"{', '.join(differences)}; complete it, or give "
    "--config.data.name=image_folder for classes of your own"
  )


def _folders(folder: pathlib.Path) -> list[str]:
  return _names(folder, os.DirEntry.is_dir)


def _images(folder: pathlib.Path) -> list[str]:
  names = _names(folder, lambda entry: entry.name.lower().endswith(SUFFIXES))
  return [str(folder / name) for name in names]


def _names(
  folder: pathlib.Path, is_wanted: Callable[[os.DirEntry[str]], bool]
) -> list[str]:
  """Returns sorted names, without hidden files such as "._1.JPEG"."""
  with os.scandir(folder) as entries:
    return sorted(
      entry.name
      for entry in entries
      if not entry.name.startswith(".") and is_wanted(entry)
    )

"""Images in folders of classes, DIR/train/CLASS/* and DIR/val/CLASS/*.

What PyTorch's examples ask for. Labels are the numbers of the sorted names of
the folders in `train`; images are numbered by class, then by file name.
"""

import concurrent.futures
import difflib
import os
import pathlib
from collections.abc import Iterator, Sequence

from pqf_jax import errors
from pqf_jax.data import decoding

# As torchvision's ImageFolder, in small or capital letters.
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


class Images:
  """The image files of one split, see `decoding.EncodedImages`."""

  def __init__(self, paths: Sequence[str], labels: Sequence[int]) -> None:
    self.paths = paths
    self.labels = labels

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, index: int) -> decoding.EncodedImage:
    with open(self.paths[index], "rb") as file:
      return decoding.EncodedImage(file.read(), self.labels[index])

  def read_all(self) -> Iterator[decoding.EncodedImage]:
    """All in order."""
    return (self[index] for index in range(len(self)))

  def place(self, index: int) -> str:
    """The file."""
    return self.paths[index]


class Folder:
  """A folder with images of both splits."""

  def __init__(
    self, top: pathlib.Path, class_names: Sequence[str] | None = None
  ) -> None:
    """Looks which classes there are.

    Args:
      top: holds `train`, and `val` or `validation`.
      class_names: the classes that must be there; None: whatever there are.

    Raises:
      InputError: a folder is missing, or the classes are others.
    """
    self._train = top / "train"
    tests = [top / name for name in TEST_FOLDERS if (top / name).is_dir()]
    if not self._train.is_dir() or not tests:
      has, lacks = ("train", "val") if not tests else (tests[0].name, "train")
      raise errors.InputError(
        f"{top} has a folder {has}, but none named {lacks}; images are looked "
        "for in train/CLASS and val/CLASS"
      )
    self._test = tests[0]
    self.class_names = _folders(self._train)
    if class_names is not None:
      _check_classes(self._train, self.class_names, class_names)

  @property
  def num_classes(self) -> int:
    """Number of folders in `train`."""
    return len(self.class_names)

  def flat_test_files(self) -> list[str]:
    """Images that lie in `val` itself, if it has no folders of classes."""
    return [] if _folders(self._test) else _images(self._test)

  def split(self, name: str) -> Images:
    """The images of `train`, or by any other name those of `val`.

    Raises:
      InputError: there are no images, or of classes that `train` has not.
    """
    folder = self._train if name == "train" else self._test
    found = _folders(folder)
    if not found:
      inside = next((entry.name for entry in os.scandir(folder)), None)
      raise errors.InputError(
        f"{folder} has no folders of classes, "
        + (f"only files such as {inside}" if inside else "it is empty")
        + f": images belong into {folder.name}/CLASS. For the validation "
        "images of ImageNet, whose labels are known by their names, python -m "
        f"pqf_jax.data.prepare imagenet2012 --from {folder.parent} --to DIR "
        "does it"
      )
    unknown = sorted(set(found) - set(self.class_names))
    if unknown:
      near = difflib.get_close_matches(unknown[0], self.class_names, 1)
      raise errors.InputError(
        f"{folder / unknown[0]} is a class that {self._train} does not have"
        + (f" (it has {near[0]})" if near else "")
        + f"; {len(unknown)} such folders, rename or remove them"
      )
    with concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as pool:
      files = list(pool.map(_images, [folder / name for name in found]))
    empty = [
      name for name, of_class in zip(found, files, strict=True) if not of_class
    ]
    if empty and name == "train" or len(empty) == len(found):
      raise errors.InputError(
        f"{folder / empty[0]} holds no images (files that end in "
        f"{' '.join(SUFFIXES)}); complete or remove it"
      )
    number = {name: label for label, name in enumerate(self.class_names)}
    labels = [
      number[name]
      for name, of_class in zip(found, files, strict=True)
      for _ in of_class
    ]
    return Images([path for of_class in files for path in of_class], labels)


def _check_classes(
  folder: pathlib.Path, found: Sequence[str], wanted: Sequence[str]
) -> None:
  """A class too few would shift the labels of those after it."""
  missing = sorted(set(wanted) - set(found))
  extra = sorted(set(found) - set(wanted))
  if not missing and not extra:
    return
  differ = [
    f"{len(names)} {what} ({names[0]}{', ...' if names[1:] else ''})"
    for names, what in ((missing, "are missing"), (extra, "are none of them"))
    if names
  ]
  raise errors.InputError(
    f"{folder} has {len(found)} folders of classes, but there must be the "
    f"{len(wanted)} classes {wanted[0]} to {wanted[-1]}: {', '.join(differ)}; "
    "complete it, or for a data set of its own, with labels by these folders, "
    "use --config.data.name=image_folder"
  )


def _folders(folder: pathlib.Path) -> tuple[str, ...]:
  with os.scandir(folder) as entries:
    return tuple(
      sorted(
        entry.name
        for entry in entries
        if entry.is_dir() and not entry.name.startswith(".")
      )
    )


def _images(folder: pathlib.Path) -> list[str]:
  # Names that begin with a dot are left by file managers, "._1.JPEG" too.
  with os.scandir(folder) as entries:
    names = [
      entry.name
      for entry in entries
      if entry.name.lower().endswith(SUFFIXES)
      and not entry.name.startswith(".")
    ]
  return [str(folder / name) for name in sorted(names)]

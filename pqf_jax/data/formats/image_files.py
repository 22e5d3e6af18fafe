"""Images in folders of classes, DIR/train/CLASS/* and DIR/val/CLASS/*.

This is the layout of PyTorch's examples. Labels are the numbers of the sorted
names of the folders in `train`; images are numbered by class, then by folder,
then by file name. As in torchvision's ImageFolder, images may lie in folders
below that of their class, links are followed, and a class without images is an
error. A folder is read once for a class, however many links lead to it, so that
links in a circle have an end. Other files, hidden ones such as "._1.JPEG"
(which ImageFolder takes) and what is no regular file are skipped; a warning
counts and names them.
"""

import collections
import concurrent.futures
import difflib
import heapq
import itertools
import os
import pathlib
import warnings
from collections.abc import Sequence

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
# In a warning; the others are counted.
MAX_NAMED = 5


class Images(decoding.EncodedImages):
  """The image files of one split."""

  def __init__(self, paths: Sequence[str], labels: Sequence[int]) -> None:
    self.paths = paths
    self.labels = labels

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, index: int) -> decoding.EncodedImage:
    data = decoding.read_file(self.paths[index])
    return decoding.EncodedImage(data, self.labels[index])

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
      InputError: a folder is missing, or the classes are not those expected,
        or only one.
    """
    self._train = top / "train"
    tests = [top / name for name in TEST_FOLDERS if (top / name).is_dir()]
    if not self._train.is_dir() or not tests:
      has, lacks = ("train", "val") if not tests else (tests[0].name, "train")
      raise errors.InputError(
        f"{top} has a folder {has}, but no folder {lacks}; put the images into "
        "train/CLASS and val/CLASS"
      )
    if len(tests) > 1:
      raise errors.InputError(
        f"{top} has both folders {' and '.join(TEST_FOLDERS)}, so that it is "
        "not known which has the test images; move or rename one"
      )
    self._test = tests[0]
    self.class_names = _folders(self._train)
    self._are_known = bool(class_names)
    if class_names:
      _check_classes(self._train, self.class_names, class_names)
    if len(self.class_names) == 1:
      raise errors.InputError(
        f"{self._train} has one folder of a class, {self.class_names[0]}; a "
        "classifier needs two or more: put the images into train/CLASS"
      )

  @property
  def num_classes(self) -> int:
    """The number of folders in `train`."""
    return len(self.class_names)

  @property
  def split_names(self) -> tuple[str, ...]:
    """Both splits."""
    return "train", "validation"

  def flat_test_files(self) -> list[str]:
    """Returns the images in `val` itself, if it has no folders of classes."""
    if _folders(self._test):
      return []
    images, skipped = _images(self._test)
    _warn_of_skipped(self._test, skipped)
    return images

  def split(self, name: str) -> Images:
    """Returns the images of `train`, or for any other name those of `val`.

    Raises:
      InputError: there are no images, or some of a class that `train` lacks,
        or none of one that it has; where the classes are known, as ImageNet's
        are, this is a warning.
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
      listed = list(pool.map(_images, [folder / name for name in class_names]))
    images_of = {
      name: images
      for name, (images, _) in zip(class_names, listed, strict=True)
    }
    empty = [name for name in class_names if not images_of[name]]
    if empty:
      raise errors.InputError(
        f"{folder / empty[0]} holds no images (files that end in "
        f"{' '.join(SUFFIXES)}); complete or remove it"
      )
    beside = sorted(set(os.listdir(folder)) - set(class_names))
    skipped = [os.fspath(folder / name) for name in beside]
    _warn_of_skipped(
      folder, skipped + [path for _, paths in listed for path in paths]
    )
    lacking = [name for name in self.class_names if name not in images_of]
    if lacking:
      found = (
        f"{folder} has no images of {len(lacking)} of the {self.num_classes} "
        f"classes: {_first(lacking)}"
      )
      if not self._are_known:
        raise errors.InputError(
          f"{found}; add some, or remove these classes from {self._train}"
        )
      warnings.warn(found, stacklevel=2)
    label = {name: number for number, name in enumerate(self.class_names)}
    labels = [label[name] for name in class_names for _ in images_of[name]]
    return Images(list(itertools.chain(*images_of.values())), labels)


def unlabelled_folder(folder: str) -> pathlib.Path:
  """Returns the path of a folder.

  Raises:
    InputError: there is no such folder.
  """
  path = pathlib.Path(folder).expanduser()
  if not path.is_dir():
    raise errors.InputError(
      f"config.data.unlabelled is {folder!r}, which is no folder; give one "
      "with images"
    )
  return path


def unlabelled_images(folder: str) -> Images:
  """Returns the images in a folder and below, all with label 0.

  Raises:
    InputError: there is no such folder, or no image in it.
  """
  path = unlabelled_folder(folder)
  images, skipped = _images(path)
  if not images:
    raise errors.InputError(
      f"{folder} holds no images (files that end in {' '.join(SUFFIXES)})"
    )
  _warn_of_skipped(path, skipped)
  return Images(images, [0] * len(images))


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
  """Returns sorted names, without hidden folders such as ".cache"."""
  with os.scandir(folder) as entries:
    return sorted(
      entry.name
      for entry in entries
      if not entry.name.startswith(".") and _is_folder(entry)
    )


def _images(folder: pathlib.Path) -> tuple[list[str], list[str]]:
  """Returns the images in a folder and below, and what is skipped there."""
  images, skipped = [], []
  pending = [(False, os.fspath(folder))]
  # A link to a folder above would lead to the images of other classes.
  seen = set(map(os.fspath, folder.resolve().parents))
  while pending:
    # Links last and in order, so that it is known which one is read.
    _, parent = heapq.heappop(pending)
    identity = os.path.realpath(parent)
    if identity in seen:
      skipped.append(parent)
      continue
    seen.add(identity)
    with os.scandir(parent) as entries:
      for entry in entries:
        is_hidden = entry.name.startswith(".")
        if _is_folder(entry) and not is_hidden:
          heapq.heappush(pending, (entry.is_symlink(), entry.path))
        elif (
          _is_regular(entry)
          and not is_hidden
          and entry.name.lower().endswith(SUFFIXES)
        ):
          images.append((parent, entry.name))
        else:
          skipped.append(entry.path)
  return [os.path.join(*image) for image in sorted(images)], sorted(skipped)


# Of an entry the kind is known without asking the disk, unless it is a link,
# and a link to itself is an error there.
def _is_folder(entry: os.DirEntry[str]) -> bool:
  return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _is_regular(entry: os.DirEntry[str]) -> bool:
  return os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file()


def _warn_of_skipped(folder: pathlib.Path, skipped: Sequence[str]) -> None:
  if not skipped:
    return
  suffixes = collections.Counter(
    os.path.splitext(path)[1] or "no suffix" for path in skipped
  )
  kinds = [f"{kind}: {count}" for kind, count in suffixes.most_common()]
  names = [os.path.relpath(path, folder) for path in skipped]
  warnings.warn(
    f"{folder}: {len(skipped)} entries are skipped ({_first(kinds)}), since "
    f"they are hidden or no regular files that end in {' '.join(SUFFIXES)}: "
    f"{_first(names)}",
    stacklevel=2,
  )


def _first(names: Sequence[str]) -> str:
  return ", ".join(names[:MAX_NAMED]) + (", ..." * (len(names) > MAX_NAMED))

"""ImageNet's two archives, whose images are read in place.

ILSVRC2012_img_train.tar holds one archive for each class, CLASS.tar, and
ILSVRC2012_img_val.tar holds the 50,000 validation images, whose names determine
their labels. Neither is unpacked.
"""

import pathlib
import tarfile
from collections.abc import Iterator
from typing import IO, NamedTuple

from pqf_jax import errors
from pqf_jax.data import decoding
from pqf_jax.data.datasets import imagenet_labels

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VALIDATION_TAR = "ILSVRC2012_img_val.tar"


class Member(NamedTuple):
  """One image, and the place of its bytes in the archive."""

  name: str
  label: int
  offset: int
  num_bytes: int


class Images(decoding.EncodedImages):
  """Images in an archive."""

  def __init__(self, tar: pathlib.Path, members: list[Member]) -> None:
    self._tar = tar
    self.members = members

  def __len__(self) -> int:
    return len(self.members)

  def __getitem__(self, index: int) -> decoding.EncodedImage:
    member = self.members[index]
    with open(self._tar, "rb") as file:
      file.seek(member.offset)
      data = file.read(member.num_bytes)
    return decoding.EncodedImage(data, member.label)

  def place(self, index: int) -> str:
    """Returns the names of the image and of the archive."""
    return f"{self.members[index].name} in {self._tar}"


def train_images(folder: pathlib.Path) -> Images:
  """Finds the training images.

  Args:
    folder: holds `TRAIN_TAR` as it was downloaded.

  Raises:
    InputError: the file is not the original, or is cut short.
  """
  path = folder / TRAIN_TAR
  names = imagenet_labels.class_names()
  label = {f"{name}.tar": number for number, name in enumerate(names)}
  members: list[Member] = []
  classes = set()
  with open(path, "rb") as file:
    for outer in _files_in(path, file, 0):
      name = pathlib.PurePosixPath(outer.name).name
      if name not in label:
        raise errors.InputError(
          f"{path} holds {outer.name}, but must hold one CLASS.tar for each "
          "class, such as n01440764.tar; give the archive as it was downloaded"
        )
      classes.add(name)
      members += [
        Member(
          pathlib.PurePosixPath(image.name).name,
          label[name],
          image.offset_data,
          image.size,
        )
        for image in _files_in(path, file, outer.offset_data, outer.size)
      ]
  if len(classes) != len(label):
    raise errors.InputError(
      f"{path} holds {len(classes)} of {len(label)} classes: it is cut short "
      "or not the original; download it again"
    )
  return Images(path, members)


def validation_images(folder: pathlib.Path) -> Images:
  """Finds the validation images, in the order of their numbers.

  Args:
    folder: holds `VALIDATION_TAR` as it was downloaded.

  Raises:
    InputError: the file is not the original, or is cut short.
  """
  path = folder / VALIDATION_TAR
  with open(path, "rb") as file:
    members = [
      Member(
        name := pathlib.PurePosixPath(info.name).name,
        imagenet_labels.validation_label(name),
        info.offset_data,
        info.size,
      )
      for info in _files_in(path, file, 0)
    ]
  return Images(path, sorted(members))


def _files_in(
  path: pathlib.Path, file: IO[bytes], start: int, num_bytes: int | None = None
) -> Iterator[tarfile.TarInfo]:
  """Yields the files of the archive that begins at byte `start` of `file`.

  Raises:
    InputError: the archive is cut short or cannot be read.
  """
  size = path.stat().st_size
  end = size if num_bytes is None else start + num_bytes
  file.seek(start)
  try:
    with tarfile.open(fileobj=file, mode="r:") as tar:
      yield from (info for info in tar if info.isfile())
      # A whole archive ends with blocks of zeros.
      if end - tar.offset < tarfile.BLOCKSIZE:
        raise errors.InputError(
          f"{path} is cut short: it has {size} bytes and no end; download it "
          "again"
        )
  except tarfile.TarError as error:
    raise errors.InputError(
      f"{path} cannot be read as an archive ({error}, after byte {start}); "
      "download it again"
    ) from error

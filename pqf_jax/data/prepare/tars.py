"""ImageNet's two archives, whose images are read where they lie.

ILSVRC2012_img_train.tar holds one archive a class, CLASS.tar, and
ILSVRC2012_img_val.tar the 50,000 validation images, whose labels are known by
their names. Neither is unpacked.
"""

import pathlib
import tarfile
from collections.abc import Iterator
from typing import IO, NamedTuple

from pqf_jax import errors
from pqf_jax.data import decoding
from pqf_jax.data.datasets import ilsvrc

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VALIDATION_TAR = "ILSVRC2012_img_val.tar"


class Member(NamedTuple):
  """One image: where its bytes lie in the archive."""

  name: str
  label: int
  offset: int
  num_bytes: int


class Images:
  """Images in an archive, see `decoding.EncodedImages`."""

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

  def read_all(self) -> Iterator[decoding.EncodedImage]:
    """All in order."""
    return (self[index] for index in range(len(self)))

  def place(self, index: int) -> str:
    """Name of the image and of the archive."""
    return f"{self.members[index].name} in {self._tar}"


def train_images(folder: pathlib.Path) -> Images:
  """The training images.

  Args:
    folder: holds `TRAIN_TAR` as it was downloaded.

  Raises:
    InputError: it is not that file, cut short or packed anew.
  """
  path = folder / TRAIN_TAR
  label = {f"{name}.tar": i for i, name in enumerate(ilsvrc.class_names())}
  members: list[Member] = []
  seen = set()
  with open(path, "rb") as file:
    for outer in _files_in(path, file, 0):
      name = pathlib.PurePosixPath(outer.name).name
      if name not in label:
        raise errors.InputError(
          f"{path} holds {outer.name}, but CLASS.tar is expected, such as "
          "n01440764.tar; give the archive as it was downloaded"
        )
      seen.add(name)
      members += [
        Member(
          pathlib.PurePosixPath(image.name).name,
          label[name],
          image.offset_data,
          image.size,
        )
        for image in _files_in(path, file, outer.offset_data, outer.size)
      ]
  if len(seen) != len(label):
    raise errors.InputError(
      f"{path} holds {len(seen)} of {len(label)} classes: it is cut short or "
      "was packed anew; download it again"
    )
  return Images(path, members)


def validation_images(folder: pathlib.Path) -> Images:
  """The validation images in the order of their numbers.

  Args:
    folder: holds `VALIDATION_TAR` as it was downloaded.

  Raises:
    InputError: it is not that file, or cut short.
  """
  path = folder / VALIDATION_TAR
  with open(path, "rb") as file:
    members = [
      Member(name, ilsvrc.validation_label(name), info.offset_data, info.size)
      for info in _files_in(path, file, 0)
      for name in [pathlib.PurePosixPath(info.name).name]
    ]
  return Images(path, sorted(members))


def _files_in(
  path: pathlib.Path, file: IO[bytes], start: int, num_bytes: int | None = None
) -> Iterator[tarfile.TarInfo]:
  """Files in the archive that begins at a byte of another, whole ones only."""
  size = path.stat().st_size
  end = size if num_bytes is None else start + num_bytes
  file.seek(start)
  try:
    with tarfile.open(fileobj=file, mode="r:") as tar:
      while (info := tar.next()) is not None:
        if info.isfile():
          yield info
        # Not kept: of a million members this is 1 GB.
        tar.members = []
      # An archive ends with blocks of zeros.
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

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
from pqf_jax.data.prepare import shards

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VALIDATION_TAR = "ILSVRC2012_img_val.tar"
# Zeros at the end: two blocks, and what fills the last record of twenty blocks.
LONGEST_END = tarfile.RECORDSIZE + 2 * tarfile.BLOCKSIZE


class _Member(NamedTuple):
  """One image, and the place of its bytes in the archive."""

  name: str
  offset: int
  num_bytes: int
  label: int


class _Images(decoding.EncodedImages):
  """Images in an archive."""

  def __init__(self, tar: pathlib.Path, members: list[_Member]) -> None:
    self._tar = tar
    self._members = members

  def __len__(self) -> int:
    return len(self._members)

  def __getitem__(self, index: int) -> decoding.EncodedImage:
    member = self._members[index]
    with open(self._tar, "rb") as file:
      file.seek(member.offset)
      data = file.read(member.num_bytes)
    return decoding.EncodedImage(data, member.label)

  def place(self, index: int) -> str:
    """Returns the names of the image and of the archive."""
    return f"{self._members[index].name} in {self._tar}"


def train_images(folder: pathlib.Path) -> shards.Split:
  """Finds the training images.

  Args:
    folder: holds `TRAIN_TAR` as it was downloaded.

  Raises:
    InputError: the file is not the original, is cut short, or one of the
      archives in it is damaged, empty, or there twice; the message names it.
  """
  path = folder / TRAIN_TAR
  names = imagenet_labels.class_names()
  label = {f"{name}.tar": number for number, name in enumerate(names)}
  members: list[_Member] = []
  num_classes = 0
  with open(path, "rb") as file:
    for name, offset, num_bytes in _files_in(str(path), file):
      if name not in label:
        raise errors.InputError(
          f"{path} holds {name}, but must hold one CLASS.tar for each class, "
          "such as n01440764.tar; give the archive as it was downloaded"
        )
      num_classes += 1
      members += [
        _Member(*image, label[name])
        for image in _files_in(f"{name} in {path}", file, offset, num_bytes)
      ]
  if num_classes != len(label):
    raise errors.InputError(
      f"{path} holds {num_classes} of {len(label)} classes: it is cut short "
      "or not the original; download it again"
    )
  return _split(path, members)


def validation_images(folder: pathlib.Path) -> shards.Split:
  """Finds the validation images in `VALIDATION_TAR`, ordered by number.

  Arguments and errors are those of `train_images`.
  """
  path = folder / VALIDATION_TAR
  with open(path, "rb") as file:
    members = [
      _Member(*image, imagenet_labels.validation_label(image[0]))
      for image in _files_in(str(path), file)
    ]
  return _split(path, sorted(members))


def _split(path: pathlib.Path, members: list[_Member]) -> shards.Split:
  return shards.Split(
    _Images(path, members),
    [member.name for member in members],
    [member.num_bytes for member in members],
  )


def _files_in(
  place: str, file: IO[bytes], start: int = 0, num_bytes: int | None = None
) -> Iterator[tuple[str, int, int]]:
  """Yields name, offset and size of the files in an archive within `file`.

  Args:
    place: names the archive in messages.
    file: holds it from byte `start` on.
    start: see `file`.
    num_bytes: size of the archive; None: it goes to the end of `file`.

  Raises:
    InputError: the archive is empty, damaged or cut short, or holds two files
      of one name or something that is neither a file nor a folder.
  """
  end = file.seek(0, 2) if num_bytes is None else start + num_bytes
  file.seek(start)
  names = set()
  try:
    with tarfile.open(fileobj=file, mode="r:") as tar:
      for info in tar:
        if tar.offset > end:
          break
        name = pathlib.PurePosixPath(info.name).name
        if info.isdir():
          continue
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
          raise errors.InputError(
            f"{place}: {name} is a link or another special file, but must be "
            "an ordinary one; download the archive again"
          )
        if name in names:
          raise errors.InputError(
            f"{place}: {name} is there twice; download the archive again"
          )
        names.add(name)
        yield name, info.offset_data, info.size
      stop = tar.offset
  except errors.InputError:
    raise
  except (tarfile.TarError, ValueError, OverflowError) as error:
    raise errors.InputError(
      f"{place} cannot be read as an archive ({error}, after byte {start}); "
      "download it again"
    ) from error
  if end - stop < tarfile.BLOCKSIZE:
    raise errors.InputError(
      f"{place} is cut short: it has {end - start} bytes and no end; download "
      "it again"
    )
  # The library takes a damaged header, or zeros in the place of one, for the
  # end of the archive.
  file.seek(stop)
  if end - stop > LONGEST_END or any(file.read(end - stop)):
    raise errors.InputError(
      f"{place} is damaged at byte {stop - start} of {end - start}, where "
      "neither a file nor the archive's end begins; download it again"
    )
  if not names:
    raise errors.InputError(f"{place} holds no files; download it again")

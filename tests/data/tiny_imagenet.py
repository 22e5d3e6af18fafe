"""ImageNet's folders and archives with one small image a class and split.

An image is a flat PNG with the suffix .JPEG, like one in ImageNet itself, in a
color that depends on its label.
"""

import io
import pathlib
import tarfile

import numpy as np
from PIL import Image

from pqf_jax.data.datasets import imagenet_labels


def color(label: int, split: str) -> tuple[int, int, int]:
  return (label % 250, label // 250, 200 if split == "train" else 100)


def encoded(label: int, split: str) -> bytes:
  file = io.BytesIO()
  pixels = np.full((4, 6, 3), color(label, split), np.uint8)
  Image.fromarray(pixels).save(file, "png", compress_level=1)
  return file.getvalue()


def files(split: str) -> dict[str, tuple[int, bytes]]:
  """Makes {file name: (label, content)}, 1,000 images of a split."""
  if split == "train":
    return {
      f"{name}_7.JPEG": (label, encoded(label, split))
      for label, name in enumerate(imagenet_labels.class_names())
    }
  names = [f"ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(1000)]
  labels = [imagenet_labels.validation_label(name) for name in names]
  return {
    name: (label, encoded(label, split))
    for name, label in zip(names, labels, strict=True)
  }


def make_folders(
  top: pathlib.Path, *, validation: str = "val", flat: bool = False
) -> None:
  for split, folder in (("train", "train"), ("validation", validation)):
    for name, (label, content) in files(split).items():
      of_class = top / folder
      if split == "train" or not flat:
        of_class /= imagenet_labels.class_names()[label]
      of_class.mkdir(parents=True, exist_ok=True)
      (of_class / name).write_bytes(content)


def make_archives(top: pathlib.Path) -> None:
  """Writes archives of the same structure as those of image-net.org."""
  top.mkdir(parents=True, exist_ok=True)
  classes = {
    f"{imagenet_labels.class_names()[label]}.tar": archive({name: content})
    for name, (label, content) in files("train").items()
  }
  (top / "ILSVRC2012_img_train.tar").write_bytes(archive(classes))
  images = {name: content for name, (_, content) in files("val").items()}
  # Not in the order of their names.
  shuffled = dict(sorted(images.items(), key=lambda item: item[0][::-1]))
  (top / "ILSVRC2012_img_val.tar").write_bytes(archive(shuffled))


def archive(members: dict[str, bytes]) -> bytes:
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode="w") as tar:
    for name, content in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
  return file.getvalue()

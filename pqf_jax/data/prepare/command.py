"""Command that makes the array_record files of ImageNet, without TensorFlow.

    python -m pqf_jax.data.prepare imagenet2012 --from SOURCE --to DIR

SOURCE holds ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar as they were
downloaded (they are not unpacked), or folders of images, train/CLASS and
val/CLASS; val may have no folders of classes if its files keep their names,
ILSVRC2012_val_00000001.JPEG. Give DIR to --config.data.dir afterwards; it needs
as much space as the images, 147 GB. If the command is stopped, run it again: it
continues where it was.
"""

import argparse
import os
import pathlib
from collections.abc import Mapping, Sequence

from pqf_jax import errors
from pqf_jax.data.datasets import imagenet_labels
from pqf_jax.data.formats import image_files
from pqf_jax.data.prepare import shards, tars
from pqf_jax.runtime import progress


def main(arguments: Sequence[str]) -> int:
  """Runs the command and returns its exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m pqf_jax.data.prepare",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("name", choices=[shards.NAME])
  parser.add_argument("--from", required=True, dest="source", metavar="SOURCE")
  parser.add_argument("--to", required=True, dest="target", metavar="DIR")
  options = parser.parse_args(arguments)
  try:
    prepare_imagenet(
      pathlib.Path(options.source).expanduser(),
      pathlib.Path(options.target).expanduser(),
    )
  except (errors.InputError, OSError) as error:
    parser.exit(2, f"error: {error}\n")
  return 0


def prepare_imagenet(source: pathlib.Path, target: pathlib.Path) -> None:
  """Writes ImageNet as array_record files.

  Args:
    source: holds the two archives, or `train` and `val`.
    target: the data_dir.

  Raises:
    InputError: the source holds neither or is not complete, the disk cannot
      hold the result, or the target exists already.
  """
  shards.new_folder(target)  # refused at once
  progress.say(f"looking at the images in {source}")
  splits = _read_splits(source)
  num_images = {name: len(split.images) for name, split in splits.items()}
  with progress.track("prepare", sum(num_images.values()), unit="img") as bar:
    folder = shards.write_dataset(
      target,
      splits,
      class_names=imagenet_labels.class_names(),
      advance=bar.advance,
    )
  progress.say(
    f"{folder}: {num_images['train']} training and {num_images['validation']} "
    "validation images (all of ImageNet are 1281167 and 50000); use "
    f"--config.data.dir={target}"
  )


def _read_splits(source: pathlib.Path) -> Mapping[str, shards.Split]:
  archives = [source / tars.TRAIN_TAR, source / tars.VALIDATION_TAR]
  missing = [path.name for path in archives if not path.is_file()]
  if not missing:
    return {
      "train": tars.train_images(source),
      "validation": tars.validation_images(source),
    }
  if any(
    (source / name).is_dir() for name in ("train", *image_files.TEST_FOLDERS)
  ):
    folder = image_files.Folder(source, imagenet_labels.class_names())
    paths = folder.flat_test_files()
    if paths:
      names = map(os.path.basename, paths)
      labels = list(map(imagenet_labels.validation_label, names))
      test = image_files.Images(paths, labels)
    else:
      test = folder.split("validation")
    return {
      "train": _from_files(folder.split("train")),
      "validation": _from_files(test),
    }
  lacks = "has neither folders train and val nor" if missing[1:] else "lacks"
  raise errors.InputError(
    f"{source} {lacks} {', '.join(missing)}; give the folder that holds both "
    "archives as they were downloaded from image-net.org, or train/CLASS and "
    "val/CLASS"
  )


def _from_files(images: image_files.Images) -> shards.Split:
  return shards.Split(
    images,
    [os.path.basename(path) for path in images.paths],
    [os.path.getsize(path) for path in images.paths],
  )

"""Detection data in COCO's layout: one folder, two annotation files.

    DIR/annotations/instances_train2017.json    DIR/train2017/*.jpg
    DIR/annotations/instances_val2017.json      DIR/val2017/*.jpg

Training leaves out the same objects and images as torchvision's reference, see
`coco_targets`; evaluation uses every image and every annotation.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from pqf_jax import errors
from pqf_jax.data import batching
from pqf_jax.data.coco import annotations as coco_annotations
from pqf_jax.data.coco import batches as coco_batches
from pqf_jax.data.coco import targets as coco_targets

TRAIN, TEST = "train2017", "val2017"
FLIP_PROBABILITY = 0.5
# Every image of a batch is padded to the largest: above this limit a few large
# ones would take gigabytes. COCO's have at most 640 pixels.
LARGEST_SIDE = 2048


class Labels(NamedTuple):
  """Categories by the labels that the network gives them.

  Attributes:
    category_ids: [C] id of each label's category; 0 for label 0, the
      background, and for labels without a category.
    names: [C] name of each label's category; '' where there is none.
  """

  category_ids: tuple[int, ...]
  names: tuple[str, ...]


class Split:
  """The images of one annotation file; reading one has no side effect."""

  def __init__(
    self,
    file: coco_annotations.AnnotationFile,
    folder: epath.Path,
    images: Sequence[coco_annotations.AnnotatedImage],
    labels: Labels,
  ) -> None:
    self.images = tuple(images)
    self._file = file
    self._folder = folder
    self._label_of = {
      category_id: label
      for label, category_id in enumerate(labels.category_ids)
      if label
    }

  def __len__(self) -> int:
    return len(self.images)

  def pixels(self, index: int) -> np.ndarray:
    """Reads image number `index` in the order of ids, uint8 [H, W, 3].

    Raises:
      InputError: the file cannot be decoded, or its size is not that of the
        annotations.
    """
    entry = self.images[index]
    path = self._folder / entry.file_name
    pixels = coco_batches.read_image(path, annotated=True)
    if pixels.shape[:2] != (entry.height, entry.width):
      raise errors.InputError(
        f"{path} has {pixels.shape[0]} x {pixels.shape[1]} pixels, but "
        f"{self._file.path} says {entry.height} x {entry.width} (height x "
        "width); copy both again"
      )
    return pixels

  def targets(self, index: int) -> coco_targets.Targets:
    """Returns the objects of image number `index`, without crowds."""
    return coco_targets.read_targets(self.images[index], self._label_of)

  def ground_truth(self) -> dict[str, Any]:
    """Returns all annotations in COCO's format, for the evaluation.

    Their ids are new: pycocotools takes the id 0 for `not matched`.
    """
    annotations = [
      annotation for image in self.images for annotation in image.annotations
    ]
    return {
      "images": [
        {"id": image.id, "height": image.height, "width": image.width}
        for image in self.images
      ],
      "annotations": [
        {**annotation, "id": number}
        for number, annotation in enumerate(annotations, start=1)
      ],
      "categories": [
        {"id": category_id, "name": name}
        for category_id, name in self._file.categories.items()
      ],
    }


class DetectionDataset(NamedTuple):
  """Images with objects.

  Attributes:
    name: of its folder.
    train: images with targets, or None where only evaluation was asked for.
    test: all images of the other split.
    labels: names and category ids by label.
    side: S; every image has at most that height and width.
    num_objects: G; no image of `train` has more targets.
    notes: sentences on what was left out.
  """

  name: str
  train: Split | None
  test: Split
  labels: Labels
  side: int
  num_objects: int
  notes: tuple[str, ...]

  @property
  def num_classes(self) -> int:
    """The number of labels, with that of the background."""
    return len(self.labels.names)

  @property
  def num_draws(self) -> int:
    """Random numbers for an image: whether it is mirrored."""
    return 1

  def train_row(self, index: int, draws: np.ndarray) -> batching.Row:
    """Reads a training image with its objects, mirrored half the time.

    Returns:
      image     uint8 [S, S, 3], 0 right of and below the image
      size      int32 [2], its height and width
      image_id  int64
      boxes     float32 [G, 4], x1, y1, x2, y2 in pixels
      labels    int32 [G], from 1 on
      valid     bool [G]; boxes, labels and masks are 0 where it is False
      masks     uint8 [G, S, ceil(S / 8)], see `coco_masks.to_bits`

    Raises:
      InputError: as `Split.pixels`.
    """
    assert self.train is not None
    pixels, targets = self.train.pixels(index), self.train.targets(index)
    if draws[0] < FLIP_PROBABILITY:
      pixels, targets = coco_batches.mirror(pixels, targets)
    image_id = self.train.images[index].id
    return coco_batches.image_fields(
      pixels, image_id, self.side
    ) | coco_batches.target_fields(targets, self.num_objects, self.side)

  def test_row(self, index: int) -> batching.Row:
    """Returns `image`, `size` and `image_id` of a test image."""
    pixels, image_id = self.test.pixels(index), self.test.images[index].id
    return coco_batches.image_fields(pixels, image_id, self.side)


def load(
  data_dir: str | None,
  *,
  num_classes: int,
  with_train: bool,
  image_size: int | None = None,
  num_objects: int | None = None,
) -> DetectionDataset:
  """Opens a folder in COCO's layout; images are read when they are needed.

  Args:
    data_dir: the folder that holds `annotations`.
    num_classes: C of the network; decides how categories are numbered, see
      `number_categories`.
    with_train: whether to open the training images too.
    image_size: S in pixels; None: that of the largest image, rounded up to a
      multiple of 32.
    num_objects: G; None: as many as any training image has.

  Raises:
    InputError: a file or an entry is missing, damaged or does not fit; the
      message names it.
  """
  if not data_dir:
    raise errors.InputError(
      "COCO needs data_dir (--config.data.dir), the folder that holds "
      f"annotations/instances_{TRAIN}.json and {TRAIN}/ with the images"
    )
  top = epath.Path(data_dir).expanduser()
  splits = (TRAIN, TEST) if with_train else (TEST,)
  files = {name: _read_split(top, name) for name in splits}
  side = _buffer_side(files.values(), image_size)
  labels = number_categories(files[TEST], num_classes)
  if with_train and files[TRAIN].categories != files[TEST].categories:
    raise errors.InputError(
      f"{files[TRAIN].path} and {files[TEST].path} list different categories; "
      "both must have the same ids and names"
    )
  test = Split(files[TEST], top / TEST, files[TEST].images, labels)
  train: Split | None = None
  most_objects = 0
  notes: tuple[str, ...] = ()
  if with_train:
    images, notes = coco_targets.trainable_images(files[TRAIN])
    most_objects = coco_targets.most_objects(files[TRAIN], images, num_objects)
    train = Split(files[TRAIN], top / TRAIN, images, labels)
  return DetectionDataset(
    top.name, train, test, labels, side, most_objects, notes
  )


def number_categories(
  file: coco_annotations.AnnotationFile, num_classes: int
) -> Labels:
  """Numbers the categories of a file by the labels of the network.

  If the network has one class more than the file has categories, these are
  numbered 1, 2, ... in the order of their ids. If it has one class more than
  the highest id, every label is the id itself, gaps and all, as in
  torchvision's weights for COCO (91 classes for 80 categories). Where ids have
  no gaps, both are the same.

  Raises:
    InputError: the network has another number of classes.
  """
  ids = tuple(file.categories)
  highest = max(ids, default=0)
  if ids and ids[0] < 1:
    raise errors.InputError(
      f"{file.path}: category ids must be 1 or more (0 is the background), but "
      f"{file.categories[ids[0]]!r} has {ids[0]}; renumber the categories"
    )
  if num_classes == len(ids) + 1:
    category_ids = (0, *ids)
  elif num_classes == highest + 1:
    category_ids = tuple(
      i if i in file.categories else 0 for i in range(num_classes)
    )
  else:
    raise errors.InputError(
      f"config.model.num_classes is {num_classes}, but {file.path} has "
      f"{len(ids)} categories with ids up to {highest}: give {len(ids) + 1}, "
      f"or {highest + 1} to use the ids as labels (0 is the background)"
    )
  names = tuple(file.categories.get(i, "") for i in category_ids)
  return Labels(category_ids, names)


def unnamed_labels(num_classes: int) -> Labels:
  """Returns labels without names, whose category ids are the labels."""
  return Labels(tuple(range(num_classes)), ("",) * num_classes)


def _read_split(top: epath.Path, name: str) -> coco_annotations.AnnotationFile:
  """Reads an annotation file, and refuses a folder that lacks its images."""
  file = coco_annotations.read(top / "annotations" / f"instances_{name}.json")
  folder = top / name
  if not folder.is_dir():
    raise errors.InputError(
      f"{folder}, the folder of the images of {file.path}, is missing"
    )
  # One listing instead of a question for each of COCO's 118,287 files.
  present = {path.name for path in folder.iterdir()}
  missing = [
    image
    for image in file.images
    if image.file_name not in present
    and not (folder / image.file_name).exists()
  ]
  if missing:
    raise errors.InputError(
      f"{folder / missing[0].file_name} is missing (image {missing[0].id} of "
      f"{file.path}); copy {len(missing)} of the {len(file.images)} image "
      "files again"
    )
  return file


def _buffer_side(
  files: Iterable[coco_annotations.AnnotationFile], image_size: int | None
) -> int:
  """Returns the side S in pixels of a square that every image fits into."""
  largest, file = max(
    ((image, file) for file in files for image in file.images),
    key=lambda pair: max(pair[0].height, pair[0].width),
  )
  pixels = max(largest.height, largest.width)
  size = (
    f"{largest.file_name} of {file.path} has {largest.height} x "
    f"{largest.width} pixels (height x width)"
  )
  if image_size and pixels > image_size:
    raise errors.InputError(
      f"{size}, which does not fit into config.data.image_size {image_size}; "
      f"give {pixels} or more, or 0 for the size that is needed"
    )
  if not image_size and pixels > LARGEST_SIDE:
    raise errors.InputError(
      f"{size}, and every image of a batch is padded to the largest; scale "
      f"images and annotations down to {LARGEST_SIDE} pixels, or accept the "
      f"memory by --config.data.image_size={pixels}"
    )
  return image_size or coco_batches.rounded_up(pixels)

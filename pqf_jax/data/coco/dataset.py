"""Detection data in COCO's layout: one folder, two annotation files.

    DIR/annotations/instances_train2017.json    DIR/train2017/*.jpg
    DIR/annotations/instances_val2017.json      DIR/val2017/*.jpg

Training leaves out the same objects and images as torchvision's reference, see
`coco_targets`; evaluation uses every image and every annotation.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from pqf_jax import errors
from pqf_jax.data.coco import annotations as coco_annotations
from pqf_jax.data.coco import images as coco_images
from pqf_jax.data.coco import targets as coco_targets

TRAIN, TEST = "train2017", "val2017"
# Of red, green and blue in ImageNet, which the backbones are trained on.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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
    pixels = coco_images.read_image(self._folder / entry.file_name)
    if pixels.shape[:2] != (entry.height, entry.width):
      raise errors.InputError(
        f"{self._folder / entry.file_name} has {pixels.shape[0]} x "
        f"{pixels.shape[1]} pixels, but {self._file.path} says "
        f"{entry.height} x {entry.width} (height x width); copy both again"
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
    mean: of red, green and blue in 0..1, to normalize with.
    std: their standard deviation.
    notes: sentences on what was left out.
  """

  name: str
  train: Split | None
  test: Split
  labels: Labels
  side: int
  num_objects: int
  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  notes: tuple[str, ...]

  @property
  def num_classes(self) -> int:
    """The number of labels, with that of the background."""
    return len(self.labels.names)


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
  side = coco_images.buffer_side(files.values(), image_size)
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
    top.name, train, test, labels, side, most_objects, MEAN, STD, notes
  )


def number_categories(
  file: coco_annotations.AnnotationFile, num_classes: int
) -> Labels:
  """Gives the categories of a file labels of the network.

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
  """Returns labels that are their own ids, for want of an annotation file."""
  return Labels(tuple(range(num_classes)), ("",) * num_classes)


def _read_split(top: epath.Path, name: str) -> coco_annotations.AnnotationFile:
  """Reads an annotation file, and checks that its images are there."""
  file = coco_annotations.read(top / "annotations" / f"instances_{name}.json")
  coco_images.check_files(file, top / name)
  return file

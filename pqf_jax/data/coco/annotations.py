"""COCO annotation files, read and checked.

pycocotools accepts a damaged file and crashes later, so everything that it and
the training rely on is checked here, once, when the file is opened.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from etils import epath

from pqf_jax import errors
from pqf_jax.data.coco import masks

JsonObject = dict[str, Any]
Check = Callable[[Any], bool]


class AnnotatedImage(NamedTuple):
  """One image of an annotation file.

  Attributes:
    id: unique in the file.
    file_name: in the folder of the images.
    height, width: in pixels.
    annotations: of its objects and crowds, in the order of the file, with
      COCO's image_id, category_id, bbox, segmentation, area and iscrowd; the
      last two are added where the file leaves them out.
  """

  id: int
  file_name: str
  height: int
  width: int
  annotations: list[JsonObject]


class AnnotationFile(NamedTuple):
  """Content of an annotation file.

  Attributes:
    path: of the file.
    images: sorted by id, as in torchvision.
    categories: {category id: name}, sorted by id; ids may have gaps.
  """

  path: epath.Path
  images: tuple[AnnotatedImage, ...]
  categories: Mapping[int, str]


def read(path: epath.PathLike) -> AnnotationFile:
  """Reads and checks a file such as instances_train2017.json.

  Raises:
    InputError: the file is missing or damaged, has no images, or an entry
      lacks a field or contradicts another; the message names file and entry.
  """
  path = epath.Path(path)
  content = _content(path)
  categories = _by_id(path, content, "categories", {"name": _is_name})
  fields: dict[str, Check] = {
    "file_name": _is_name,
    "height": _is_side,
    "width": _is_side,
  }
  images = {
    image_id: AnnotatedImage(
      image_id, entry["file_name"], entry["height"], entry["width"], []
    )
    for image_id, entry in _by_id(path, content, "images", fields).items()
  }
  if not images:
    raise errors.InputError(
      f"{path} lists no images, but must list one or more; copy it again"
    )
  for index, entry in enumerate(content["annotations"]):
    annotation = _checked_annotation(path, index, entry, images, categories)
    images[annotation["image_id"]].annotations.append(annotation)
  return AnnotationFile(
    path,
    tuple(images.values()),
    {category_id: entry["name"] for category_id, entry in categories.items()},
  )


def _content(path: epath.Path) -> dict[str, list[Any]]:
  """Reads the three lists of the file."""
  if not path.exists():
    raise errors.InputError(
      f"{path} is missing; data_dir must be a folder in COCO's layout, with "
      "annotations/instances_SPLIT2017.json and the images in SPLIT2017/"
    )
  try:
    content = json.loads(path.read_text())
  except ValueError as error:
    raise errors.InputError(
      f"{path} is not valid JSON ({error}); copy it again"
    ) from error
  for name in ("images", "annotations", "categories"):
    if not isinstance(content, dict) or not isinstance(content.get(name), list):
      raise errors.InputError(
        f"{path} has no list {name!r}; give instance annotations of COCO, with "
        "the lists images, annotations and categories"
      )
  return content


def _by_id(
  path: epath.Path,
  content: Mapping[str, list[Any]],
  name: str,
  fields: dict[str, Check],
) -> dict[int, JsonObject]:
  """Returns the entries of a list by id, in the order of ids."""
  entries: dict[int, JsonObject] = {}
  for index, entry in enumerate(content[name]):
    where = f"{path}: {name}[{index}]"
    _check_fields(where, entry, {"id": _is_id} | fields)
    if entry["id"] in entries:
      raise errors.InputError(
        f"{where} has the id {entry['id']} of an earlier entry; ids must differ"
      )
    entries[entry["id"]] = entry
  return dict(sorted(entries.items()))


def _checked_annotation(
  path: epath.Path,
  index: int,
  entry: Any,
  images: Mapping[int, AnnotatedImage],
  categories: Mapping[int, JsonObject],
) -> JsonObject:
  """Returns the fields of an annotation that are used."""
  where = f"{path}: annotations[{index}]"
  fields: dict[str, Check] = {
    "image_id": _is_id,
    "category_id": _is_id,
    "bbox": _is_box,
  }
  _check_fields(where, entry, fields)
  where += f" (id {entry.get('id')})"
  if entry["image_id"] not in images:
    raise errors.InputError(
      f"{where} belongs to image {entry['image_id']}, but the file lists no "
      "image of this id; correct image_id"
    )
  if entry["category_id"] not in categories:
    raise errors.InputError(
      f"{where} has category {entry['category_id']}, but the file lists "
      f"{', '.join(map(str, categories)) or 'none'}; correct category_id"
    )
  image = images[entry["image_id"]]
  segmentation = masks.clean(entry.get("segmentation"))
  fault = masks.fault(segmentation, image.height, image.width)
  if fault:
    raise errors.InputError(
      f"{where} of {image.file_name} {fault}; correct the segmentation"
    )
  area = entry.get("area")
  if not _is_number(area):
    mask = masks.decode(segmentation, image.height, image.width)
    area = int(mask.sum())
  # Other fields would take memory: COCO has 860,001 annotations.
  return {name: entry[name] for name in fields} | {
    "area": area,
    "iscrowd": int(bool(entry.get("iscrowd"))),
    "segmentation": segmentation,
  }


def _check_fields(where: str, entry: Any, fields: Mapping[str, Check]) -> None:
  if not isinstance(entry, dict):
    raise errors.InputError(
      f"{where} is {entry!r}, but must be an object with fields"
    )
  for name, is_valid in fields.items():
    if name not in entry:
      raise errors.InputError(f"{where} has no field {name!r}; add it")
    if not is_valid(entry[name]):
      raise errors.InputError(
        f"{where} has the invalid {name} {entry[name]!r}; correct it"
      )


def _is_number(value: Any) -> bool:
  return (
    isinstance(value, int | float)
    and not isinstance(value, bool)
    and math.isfinite(value)
  )


def _is_id(value: Any) -> bool:
  # Ids are sent to the device as int64.
  return isinstance(value, int) and 0 <= value < 2**63


def _is_side(value: Any) -> bool:
  return isinstance(value, int) and value > 0


def _is_name(value: Any) -> bool:
  return isinstance(value, str) and bool(value)


def _is_box(value: Any) -> bool:
  return (
    isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))
  )

"""COCO annotation files, read and checked.

pycocotools accepts a damaged file and crashes later, so everything that it and
the training rely on is checked here, once, when the file is opened.
"""

import json
import reprlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from etils import epath

from pqf_jax import errors
from pqf_jax.data.coco import masks
from pqf_jax.runtime import files

JsonObject = dict[str, Any]
Check = Callable[[Any], bool]
# A mask takes as many bytes; Pillow refuses larger images.
MOST_PIXELS = 2**27
# Of box and mask, by their intersection over union. Less comes from boxes in
# another notation, or from masks that were drawn for another size of the image.
LEAST_OVERLAP = 0.5


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

  A warning counts the boxes that do not fit their masks, see `LEAST_OVERLAP`,
  and names the first.

  Raises:
    InputError: the file is missing or damaged, has no images, an entry lacks a
      field or contradicts another, or most boxes do not fit; the message names
      file and entry.
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
  for image in images.values():
    if image.height * image.width > MOST_PIXELS:
      raise errors.InputError(
        f"{path}: image {image.id}, {image.file_name}, has {image.height} x "
        f"{image.width} pixels (height x width), more than the {MOST_PIXELS} "
        "that can be read; correct or scale it"
      )
  misfits: list[str] = []
  for index, entry in enumerate(content["annotations"]):
    annotation = _checked_annotation(path, index, entry, images, categories)
    image = images[annotation["image_id"]]
    image.annotations.append(annotation)
    if misfit := _misfit(annotation, image):
      misfits.append(
        f"annotations[{index}] (id {_shown(entry.get('id'))}) of "
        f"{image.file_name}, {misfit}"
      )
  if misfits:
    message = (
      f"{path}: the boxes of {len(misfits)} of {len(content['annotations'])} "
      f"annotations do not fit their masks, first {misfits[0]}; COCO's boxes "
      "are x, y, width, height in pixels of the image; correct them"
    )
    if len(misfits) > len(content["annotations"]) / 2:
      raise errors.InputError(message)
    warnings.warn(message, stacklevel=2)
  return AnnotationFile(
    path,
    tuple(images.values()),
    {category_id: entry["name"] for category_id, entry in categories.items()},
  )


def _content(path: epath.Path) -> dict[str, list[Any]]:
  """Reads the three lists of the file."""
  if not path.is_file():
    raise errors.InputError(
      f"{path} is missing; data_dir must be a folder in COCO's layout, with "
      "annotations/instances_SPLIT2017.json and the images in SPLIT2017/"
    )
  files.check_regular(path)
  try:
    # From bytes, JSON may be in UTF-8, 16 or 32, with a byte order mark or not.
    content = json.loads(path.read_bytes(), parse_int=_integer)
  except ValueError as error:
    raise errors.InputError(
      f"{path} is not valid JSON ({error}); correct it, or copy it again"
    ) from error
  except RecursionError as error:
    raise errors.InputError(
      f"{path} has lists or objects nested more than a thousand deep, which "
      "annotations of COCO have not; correct it"
    ) from error
  for name in ("images", "annotations", "categories"):
    if not isinstance(content, dict) or not isinstance(content.get(name), list):
      raise errors.InputError(
        f"{path} has no list {name!r}; give instance annotations of COCO, with "
        "the lists images, annotations and categories"
      )
  return content


def _integer(digits: str) -> int | float:
  """Reads a number; as for decimals, one that no float can hold is infinite."""
  return int(digits) if len(digits) < 300 else float(digits)


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
  for name, is_valid in (("area", _is_area), ("iscrowd", _is_flag)):
    if entry.get(name) is not None:
      _check_fields(where, entry, {name: is_valid})
  where += f" (id {_shown(entry.get('id'))})"
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
  if area is None:
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
      f"{where} is {_shown(entry)}, but must be an object with fields"
    )
  for name, is_valid in fields.items():
    if name not in entry:
      raise errors.InputError(f"{where} has no field {name!r}; add it")
    if not is_valid(entry[name]):
      raise errors.InputError(
        f"{where} has the invalid {name} {_shown(entry[name])}; correct it"
      )


def _misfit(annotation: JsonObject, image: AnnotatedImage) -> str:
  """Describes box and mask where they do not fit; '' if they do.

  Boxes without area are not compared: they are not trained on.
  """
  x, y, width, height = annotation["bbox"]
  if width <= 0 or height <= 0:
    return ""
  left, top, right, bottom = masks.extent(
    annotation["segmentation"], image.height, image.width
  )
  # Rounding to whole pixels is no misfit, however small the object.
  columns = min(x + width, right) - max(x, left) + 2
  rows = min(y + height, bottom) - max(y, top) + 2
  shared = max(columns, 0) * max(rows, 0)
  union = (
    (width + 2) * (height + 2)
    + (right - left + 2) * (bottom - top + 2)
    - shared
  )
  if shared >= LEAST_OVERLAP * union:
    return ""
  return (
    f"whose box is {annotation['bbox']} but whose mask has x from {left:g} to "
    f"{right:g} and y from {top:g} to {bottom:g}"
  )


def _shown(value: Any) -> str:
  """Returns a value as one short line."""
  return reprlib.repr(value)


def _is_number(value: Any) -> bool:
  # No coordinate is larger, and float32 holds them and their sums.
  return type(value) in (int, float) and abs(value) < 2**31


def _is_area(value: Any) -> bool:
  return type(value) in (int, float) and 0 <= value < 2**62


def _is_flag(value: Any) -> bool:
  return value in (0, 1)


def _is_id(value: Any) -> bool:
  # Ids are sent to the device as int64.
  return type(value) is int and 0 <= value < 2**63


def _is_side(value: Any) -> bool:
  return type(value) is int and 0 < value <= MOST_PIXELS


def _is_name(value: Any) -> bool:
  return isinstance(value, str) and bool(value)


def _is_box(value: Any) -> bool:
  return (
    isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))
  )

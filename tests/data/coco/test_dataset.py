import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import coco as coco_api

from pqf_jax import errors
from pqf_jax.data import coco
from tests.data.coco import tiny_coco


@pytest.fixture
def folder(tmp_path):
  return tiny_coco.write(tmp_path / "tiny")


def load(folder, **settings):
  settings = {"num_classes": 4, "with_train": True} | settings
  return coco.load(str(folder), **settings)


def test_objects_and_pixels_are_those_that_were_written(folder):
  dataset = load(folder)
  assert (len(dataset.train), len(dataset.test)) == (3, 3)
  for index in range(3):
    assert dataset.train.images[index].id == 10 + index
    np.testing.assert_array_equal(
      dataset.train.pixels(index), tiny_coco.pixels(index)
    )
    targets = dataset.train.targets(index)
    assert targets.labels.tolist() == [1, 1, 2]
    np.testing.assert_array_equal(targets.masks[:2], tiny_coco.masks_of(index))
    for box, mask in zip(targets.boxes[:2], targets.masks, strict=False):
      x, y, width, height = tiny_coco.box_of(mask)
      assert box.tolist() == [x, y, x + width, y + height]
    assert (targets.boxes.dtype, targets.labels.dtype, targets.masks.dtype) == (
      np.float32,
      np.int32,
      bool,
    )


def test_sizes_are_derived_from_the_data(folder):
  dataset = load(folder)
  assert (dataset.side, dataset.num_objects, dataset.num_classes) == (96, 3, 4)
  given = load(folder, image_size=70, num_objects=9)
  assert (given.side, given.num_objects) == (70, 9)


def test_labels_are_numbered_or_the_ids_themselves(folder):
  numbered = load(folder).labels
  assert numbered.category_ids == (0, 3, 7, 12)
  assert numbered.names == ("", "disc", "bar", "never seen")
  ids = load(folder, num_classes=13)
  assert ids.labels.category_ids == (0, 0, 0, 3, 0, 0, 0, 7, 0, 0, 0, 0, 12)
  assert ids.train.targets(0).labels.tolist() == [3, 3, 7]
  with pytest.raises(errors.InputError, match="is 5, but .* give 4, or 13"):
    load(folder, num_classes=5)


def test_labels_without_annotations_are_ids():
  labels = coco.unnamed_labels(3)
  assert labels == coco.Labels((0, 1, 2), ("", "", ""))


def test_coco_with_91_classes_has_torchvisions_labels(shared_data):
  dataset = load(shared_data / "coco_sample", num_classes=91, with_train=False)
  assert dataset.labels.names[:3] == ("", "person", "bicycle")
  # https://pytorch.org/vision: twelve ids are N/A, of them 12 and 83.
  assert dataset.labels.names[90] == "toothbrush"
  assert dataset.labels.names[12] == dataset.labels.names[83] == ""
  assert (dataset.side, len(dataset.test)) == (640, 64)
  contiguous = load(
    shared_data / "coco_sample", num_classes=81, with_train=False
  )
  assert contiguous.labels.names[80] == "toothbrush"


def test_masks_of_real_annotations_are_pycocotools(shared_data):
  path = shared_data / "coco_sample"
  split = load(path, num_classes=91, with_train=False).test
  api = coco_api.COCO(str(path / "annotations/instances_val2017.json"))
  for index in range(0, 64, 4):
    targets = split.targets(index)
    ids = api.getAnnIds([split.images[index].id], iscrowd=False)
    expected = api.loadAnns(ids)
    assert targets.labels.tolist() == [a["category_id"] for a in expected]
    for mask, annotation in zip(targets.masks, expected, strict=True):
      np.testing.assert_array_equal(mask, api.annToMask(annotation))


def test_what_cannot_be_trained_on_is_left_out_and_counted(folder):
  def change(content):
    boxes = {a["id"]: a for a in content["annotations"]}
    boxes[0]["bbox"] = [5, 5, 0, 10]  # no area
    boxes[1]["bbox"] = [20, 20, -4, 10]  # negative
    boxes[2]["bbox"] = [900, 2, 5, 5]  # outside
    boxes[4]["bbox"] = [60, -3, 90, 10]  # outside
    for number in (8, 9, 10):  # hardly any
      boxes[number]["bbox"] = [5, 5, 1, 10]
      boxes[number]["segmentation"] = [[5, 5, 6, 5, 6, 15, 5, 15]]

  tiny_coco.edit(folder, change)
  with pytest.warns(UserWarning, match="boxes of 2 of 12 annotations do not"):
    dataset = load(folder)
  assert [image.id for image in dataset.train.images] == [11]
  assert dataset.notes == (
    "instances_train2017.json: 2 images without an object to train on left "
    "out of the training",
    "instances_train2017.json: 3 crowd annotations left out of the training",
    "instances_train2017.json: 4 boxes without area left out of the training",
  )
  assert dataset.train.targets(0).labels.tolist() == [1, 2]
  assert len(dataset.test) == 3


def test_boxes_are_clipped_to_the_image(folder):
  def change(content):
    content["annotations"][4]["bbox"] = [30.5, -3, 12, 10]
    content["annotations"][4]["segmentation"] = [[30, -3, 42, -3, 42, 7, 30, 7]]

  tiny_coco.edit(folder, change)
  box = load(folder).train.targets(1).boxes[0]
  assert box.tolist() == [30.5, 0, 40, 7]


def test_ground_truth_has_every_annotation_and_no_id_0(folder):
  truth = load(folder).test.ground_truth()
  assert len(truth["annotations"]) == 12
  assert sum(a["iscrowd"] for a in truth["annotations"]) == 3
  assert [a["id"] for a in truth["annotations"]] == list(range(1, 13))


def test_area_and_crowd_may_be_left_out(folder):
  def change(content):
    for annotation in content["annotations"]:
      del annotation["area"], annotation["iscrowd"]

  tiny_coco.edit(folder, change, "val2017")
  truth = load(folder, with_train=False).test.ground_truth()
  areas = [mask.sum() for i in range(3) for mask in tiny_coco.masks_of(i)]
  actual = [a["area"] for a in truth["annotations"]]
  assert [a for i, a in enumerate(actual) if i % 4 < 2] == areas
  assert {a["iscrowd"] for a in truth["annotations"]} == {0}


def test_an_image_of_one_pixel(folder):
  def change(content):
    content["images"][0] |= {"height": 1, "width": 1}
    for annotation in content["annotations"][8:]:
      annotation["bbox"] = [0, 0, 1, 1]
      annotation["segmentation"] = {"size": [1, 1], "counts": [0, 1]}

  for split in ("train2017", "val2017"):
    tiny_coco.edit(folder, change, split)
    Image.new("L", (1, 1), 200).save(folder / split / "12.png")
  dataset = load(folder)
  # A pixel is no object to train on, but the image is evaluated.
  assert [image.id for image in dataset.train.images] == [10, 11]
  assert dataset.test.pixels(2).tolist() == [[[200, 200, 200]]]
  assert dataset.test.targets(2).masks.shape == (3, 1, 1)


def test_an_image_too_large_for_the_buffer_is_refused(folder):
  with pytest.raises(
    errors.InputError, match=r"10.png .* 48 x 70 .*image_size 64; give 70"
  ):
    load(folder, image_size=64)


def test_an_image_of_ten_thousand_pixels_is_only_taken_on_demand(folder):
  def change(content):
    content["images"][0] |= {"height": 10_000, "width": 9_000}
    del content["annotations"][8:]

  tiny_coco.edit(folder, change)
  with pytest.raises(
    errors.InputError, match=r"12.png .* 10000 x 9000 .*image_size=10000"
  ):
    load(folder)
  assert load(folder, image_size=10_000).side == 10_000


def test_more_objects_than_are_padded_to_are_refused(folder):
  def change(content):
    content["annotations"].append(content["annotations"][0] | {"id": 99})

  tiny_coco.edit(folder, change)
  assert load(folder).num_objects == 4
  with pytest.raises(
    errors.InputError, match=r"10.png .* 4 objects, .*num_objects 3; give 4"
  ):
    load(folder, num_objects=3)


def first(content, name):
  return content[name][0]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda c: c.update(images=[]), "lists no images"),
    (lambda c: c.pop("annotations"), "has no list 'annotations'"),
    (
      lambda c: first(c, "images").pop("height"),
      r"images\[0\] has no field 'height'",
    ),
    (
      lambda c: first(c, "images").update(width=0),
      r"images\[0\] has the invalid width 0",
    ),
    (
      lambda c: first(c, "images").update(id="x"),
      r"images\[0\] has the invalid id 'x'",
    ),
    (
      lambda c: first(c, "images").update(id=10),
      r"images\[2\] has the id 10 of an earlier entry",
    ),
    (
      lambda c: first(c, "annotations").update(image_id=77),
      r"annotations\[0\] \(id 0\) belongs to image 77",
    ),
    (
      lambda c: first(c, "annotations").update(category_id=5),
      r"annotations\[0\] \(id 0\) has category 5, but .* 3, 7, 12",
    ),
    (
      lambda c: first(c, "annotations").pop("segmentation"),
      r"annotations\[0\] \(id 0\) of 10.png has no mask",
    ),
    (
      lambda c: first(c, "annotations").update(bbox=[1, 2, 3]),
      r"annotations\[0\] has the invalid bbox \[1, 2, 3\]",
    ),
    (
      lambda c: first(c, "annotations").update(bbox=[1, 2, 3, float("nan")]),
      "has the invalid bbox .*nan",
    ),
    (
      lambda c: first(c, "annotations").update(bbox=[1, 2, 3, 10**299]),
      "has the invalid bbox .*1e.299",
    ),
    (
      lambda c: first(c, "annotations").update(bbox=[1, 2, 3, 10**400]),
      "has the invalid bbox .*inf",
    ),
    (
      lambda c: first(c, "images").update(height=10**400),
      r"images\[0\] has the invalid height inf",
    ),
    (
      lambda c: first(c, "images").update(height=2**40),
      r"images\[0\] has the invalid height 1099511627776",
    ),
    (
      lambda c: first(c, "images").update(height=2**16, width=2**16),
      "image 12, 12.png, has 65536 x 65536 pixels .* more than the",
    ),
    (
      lambda c: first(c, "images").update(id=True),
      r"images\[0\] has the invalid id True",
    ),
    (
      lambda c: first(c, "annotations").update(area=-1),
      r"annotations\[0\] has the invalid area -1",
    ),
    (
      lambda c: first(c, "annotations").update(iscrowd="0"),
      r"annotations\[0\] has the invalid iscrowd '0'",
    ),
    (
      lambda c: c["annotations"].insert(0, 7),
      r"annotations\[0\] is 7, but must be",
    ),
    (lambda c: c.update(annotations=[]), "none of its 3 images has an object"),
    (
      lambda c: c["categories"].append({"id": 0, "name": "zero"}),
      "list different categories",
    ),
    (
      lambda c: first(c, "images").update(file_name="lost.png"),
      r"train2017/lost.png is missing \(image 12 .* 1 of the 3 image files",
    ),
  ],
)
def test_bad_annotations_are_refused(folder, change, message):
  tiny_coco.edit(folder, change)
  with pytest.raises(errors.InputError, match=message) as caught:
    load(folder)
  assert "instances_train2017.json" in str(caught.value)


def test_the_background_is_no_category(folder):
  def change(content):
    content["categories"].append({"id": 0, "name": "zero"})

  tiny_coco.edit(folder, change, "val2017")
  with pytest.raises(errors.InputError, match="'zero' has 0"):
    load(folder, with_train=False)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("", "is not valid JSON"),
    ('{"images": [', "is not valid JSON"),
    ("\x00", "is not valid JSON"),
    ("[1, 2]", "has no list 'images'"),
    ("[" * 100_000 + "]" * 100_000, "has lists or objects nested more than"),
    ("7" * 5000, "has no list 'images'"),
  ],
)
def test_a_damaged_file_is_refused(folder, content, message):
  path = folder / "annotations/instances_val2017.json"
  path.write_text(content)
  with pytest.raises(
    errors.InputError, match=f"instances_val2017.json {message}"
  ):
    load(folder)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_understood(folder, encoding):
  path = folder / "annotations/instances_val2017.json"
  path.write_text(path.read_text(), encoding=encoding)
  assert len(load(folder).test) == 3


def as_corners(annotation):
  x, y, width, height = annotation["bbox"]
  annotation["bbox"] = [x, y, x + width, y + height]


def beside(annotation):
  annotation["bbox"][0] -= 15


def four_times_larger(annotation):
  x, y, width, height = annotation["bbox"]
  corners = x, y, x + width, y, x + width, y + height, x, y + height
  annotation["segmentation"] = [[min(4 * value, 66) for value in corners]]


@pytest.mark.parametrize("change", [as_corners, beside, four_times_larger])
def test_boxes_that_do_not_fit_their_masks_are_named(folder, change):
  tiny_coco.edit(folder, lambda c: change(c["annotations"][5]))
  with pytest.warns(
    UserWarning,
    match=r"instances_train2017.json: the boxes of 1 of 12 annotations do not "
    r"fit their masks, first annotations\[5\] \(id 5\) of 11.png, whose box",
  ):
    assert len(load(folder).train) == 3

  def change_all(content):
    for annotation in content["annotations"]:
      change(annotation)

  tiny_coco.edit(folder, change_all, "val2017")
  with pytest.raises(
    errors.InputError,
    match="of 12 annotations do not fit .* boxes are x, y, width, height",
  ):
    load(folder, with_train=False)


def test_boxes_of_real_annotations_fit(shared_data, recwarn):
  load(shared_data / "coco_sample", num_classes=91, with_train=False)
  assert not recwarn.list


def test_missing_folders_are_refused(folder, tmp_path):
  with pytest.raises(errors.InputError, match="needs data_dir"):
    coco.load("", num_classes=4, with_train=True)
  with pytest.raises(errors.InputError, match="instances_.* is missing; data_"):
    load(tmp_path / "nothing")
  (folder / "val2017").rename(folder / "elsewhere")
  with pytest.raises(
    errors.InputError, match="val2017, the folder .* is missing"
  ):
    load(folder, with_train=False)


def test_only_the_test_images_are_needed_to_evaluate(folder):
  (folder / "annotations/instances_train2017.json").unlink()
  dataset = load(folder, with_train=False)
  assert dataset.train is None
  assert len(dataset.test) == 3


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_a_damaged_image_is_refused_when_it_is_read(folder, content):
  path = folder / "val2017/11.png"
  dataset = load(folder)
  path.write_bytes(path.read_bytes()[:200] if content is None else content)
  with pytest.raises(errors.InputError, match="11.png cannot be decoded"):
    dataset.test.pixels(1)


def test_an_image_of_16_bits_is_scaled_and_one_of_floats_refused(folder):
  pixels = np.full((64, 40), 200 * 257, np.uint16)
  Image.fromarray(pixels).save(folder / "val2017/11.png")
  assert (load(folder).test.pixels(1) == 200).all()
  Image.fromarray(pixels / np.float32(2**16)).save(
    folder / "val2017/11.png", "tiff"
  )
  with pytest.raises(errors.InputError, match=r"11.png .*mode F .* with 8 bit"):
    load(folder).test.pixels(1)


@pytest.mark.parametrize("orientation", [3, 6])
def test_an_image_that_viewers_turn_is_refused(folder, orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  Image.new("RGB", (40, 64)).save(folder / "val2017/11.png", exif=exif)
  with pytest.raises(
    errors.InputError, match=f"11.png .*EXIF orientation is {orientation}"
  ):
    load(folder).test.pixels(1)


def test_an_image_of_another_size_than_annotated_is_refused(folder):
  Image.new("RGB", (41, 64)).save(folder / "val2017/11.png")
  with pytest.raises(
    errors.InputError, match="11.png has 64 x 41 pixels, .* says 64 x 40"
  ):
    load(folder).test.pixels(1)


def test_categories_survive_json(folder):
  def change(content):
    content["info"] = {"year": 2017}

  tiny_coco.edit(folder, change)
  assert json.dumps(load(folder).test.ground_truth())

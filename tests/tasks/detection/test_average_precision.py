import contextlib
import io
import json
import os
import pathlib
from typing import NamedTuple

import numpy as np
import pytest
from pycocotools import coco as coco_api
from pycocotools import cocoeval
from pycocotools import mask as coco_rle

from pqf_jax import data, errors
from pqf_jax.data import coco
from pqf_jax.tasks.detection import average_precision
from tests.data.coco import tiny_coco


class Found(NamedTuple):
  boxes: np.ndarray
  scores: np.ndarray
  labels: np.ndarray
  masks: np.ndarray
  valid: np.ndarray


@pytest.fixture
def tiny(tmp_path) -> coco.DetectionDataset:
  folder = tiny_coco.write(tmp_path / "tiny")
  return coco.load(str(folder), num_classes=4, with_train=False)


def whole(targets) -> average_precision.Detections:
  """The targets themselves, found with certainty."""
  scores = np.ones(len(targets.labels), np.float32)
  return average_precision.Detections(
    targets.boxes, scores, targets.labels, targets.masks
  )


def perturbed(
  dataset: coco.DetectionDataset, index: int
) -> average_precision.Detections:
  """Objects jittered, dropped, relabelled and found twice; crowds hit too."""
  rng = np.random.default_rng(index)
  image = dataset.test.images[index]
  targets = dataset.test.targets(index)
  ids = dataset.labels.category_ids
  crowds = [a for a in image.annotations if a["iscrowd"]]
  boxes = [targets.boxes]
  labels = [targets.labels]
  masks = [targets.masks]
  for crowd in crowds:  # three hits in each
    x, y, width, height = crowd["bbox"]
    boxes.append(
      np.float32([[x, y, x + width / s, y + height] for s in (1, 2, 3)])
    )
    labels.append(np.full(3, ids.index(crowd["category_id"]), np.int32))
    masks.append(rng.random((3, image.height, image.width)) < 0.5)
  repeats = 120 // max(len(targets.labels), 1) + 1 if index % 16 == 0 else 2
  boxes = np.concatenate(boxes * repeats)
  labels = np.concatenate(labels * repeats)
  masks = np.concatenate(masks * repeats)
  kept = rng.random(len(boxes)) < 0.85
  boxes = boxes[kept] + rng.normal(0, 2, (kept.sum(), 4)).astype(np.float32)
  boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
  labels = np.where(
    rng.random(kept.sum()) < 0.15,
    rng.integers(1, len(ids), kept.sum()),
    labels[kept],
  )
  shift = tuple(rng.integers(-2, 3, 2))
  return average_precision.Detections(
    boxes,
    rng.random(len(boxes)).astype(np.float32),
    labels,
    np.roll(masks[kept], shift, axis=(1, 2)),
  )


def official_statistics(
  path: pathlib.Path, found: dict[int, average_precision.Detections], ids
) -> dict[str, np.ndarray]:
  """pycocotools called on the files, as its own demonstration does."""
  statistics = {}
  for kind in ("bbox", "segm"):
    results = []
    for image_id, detections in found.items():
      for box, score, label, mask in zip(*detections, strict=True):
        result = {
          "image_id": image_id,
          "category_id": ids[label],
          "score": float(score),
        }
        if kind == "bbox":
          x1, y1, x2, y2 = box
          result["bbox"] = [float(v) for v in (x1, y1, x2 - x1, y2 - y1)]
        else:
          rle = coco_rle.encode(np.asfortranarray(mask.astype(np.uint8)))
          result["segmentation"] = rle
        results.append(result)
    with contextlib.redirect_stdout(io.StringIO()):
      truth = coco_api.COCO(str(path))
      evaluation = cocoeval.COCOeval(truth, truth.loadRes(results), kind)
      evaluation.evaluate()
      evaluation.accumulate()
      evaluation.summarize()
    statistics[kind] = evaluation.stats
  return statistics


def annotation_file(folder: pathlib.Path) -> pathlib.Path:
  return folder / "annotations/instances_val2017.json"


class Perturbed(NamedTuple):
  path: pathlib.Path
  dataset: coco.DetectionDataset
  found: dict[int, average_precision.Detections]
  results: list[dict]
  statistics: dict[str, float]


@pytest.fixture(scope="module")
def sample() -> Perturbed:
  """Real annotations, and detections that are neither good nor worthless."""
  folder = os.environ.get("PQF_JAX_SHARED")
  if not folder:
    pytest.skip("PQF_JAX_SHARED names no folder of real data")
  folder = pathlib.Path(folder) / "data/coco_sample"
  dataset = coco.load(str(folder), num_classes=91, with_train=False)
  split, ids = dataset.test, dataset.labels.category_ids
  found = {
    image.id: perturbed(dataset, index)
    for index, image in enumerate(split.images)
  }
  results = [
    result
    for image_id, one in found.items()
    for result in average_precision.to_results(one, image_id, ids)
  ]
  truth = average_precision.make_ground_truth(split)
  statistics = average_precision.average_precision(truth, results)
  return Perturbed(annotation_file(folder), dataset, found, results, statistics)


def test_statistics_are_those_of_the_official_calls(sample):
  assert max(len(one.labels) for one in sample.found.values()) > 100
  ids = sample.dataset.labels.category_ids
  # Labels that no category has, which the official calls ignore, are left out.
  assert any(
    not ids[label] for one in sample.found.values() for label in one.labels
  )
  expected = official_statistics(sample.path, sample.found, ids)
  values = list(sample.statistics.values())
  np.testing.assert_allclose(values[:12], expected["bbox"], rtol=0, atol=1e-12)
  np.testing.assert_allclose(values[12:], expected["segm"], rtol=0, atol=1e-12)
  # Or this would say little.
  assert 0.1 < sample.statistics["box_ap"] < 0.9
  assert 0.1 < sample.statistics["mask_ap"] < 0.9
  assert len(set(values)) == 24


def test_drawn_images_have_the_official_statistics_too(tiny, tmp_path):
  split, ids = tiny.test, tiny.labels.category_ids
  found = {
    image.id: perturbed(tiny, index) for index, image in enumerate(split.images)
  }
  results = [
    result
    for image_id, one in found.items()
    for result in average_precision.to_results(one, image_id, ids)
  ]
  truth = average_precision.make_ground_truth(split)
  statistics = average_precision.average_precision(truth, results)
  path = annotation_file(tmp_path / "tiny")
  # Its first annotation has the id 0, which pycocotools counts as not matched.
  tiny_coco.edit(tmp_path / "tiny", number_from_one, "val2017")
  expected = official_statistics(path, found, ids)
  values = list(statistics.values())
  np.testing.assert_allclose(values[:12], expected["bbox"], rtol=0, atol=1e-12)
  np.testing.assert_allclose(values[12:], expected["segm"], rtol=0, atol=1e-12)
  assert 0.01 < statistics["box_ap"] < 0.9


def number_from_one(content: dict) -> None:
  for annotation in content["annotations"]:
    annotation["id"] += 1


def test_names_of_the_statistics():
  ap = ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"]
  ar = ["ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large"]
  assert list(average_precision.STATISTICS) == ap + ar
  parameters = cocoeval.Params(iouType="bbox")
  assert parameters.maxDets == [1, 10, average_precision.MOST_DETECTIONS]


def results_of(dataset, indices) -> list[dict]:
  return [
    result
    for index in indices
    for result in average_precision.to_results(
      whole(dataset.test.targets(index)),
      dataset.test.images[index].id,
      dataset.labels.category_ids,
    )
  ]


def test_perfect_detections_have_ap_1(tiny):
  truth = average_precision.make_ground_truth(tiny.test)
  statistics = average_precision.average_precision(
    truth, results_of(tiny, range(3))
  )
  assert len(statistics) == 24
  for kind in ("box", "mask"):
    assert statistics[f"{kind}_ap"] == pytest.approx(1, abs=1e-12)
    assert statistics[f"{kind}_ar_100"] == pytest.approx(1, abs=1e-12)
    assert statistics[f"{kind}_ap_large"] == -1


def test_what_is_not_found_counts(tiny):
  truth = average_precision.make_ground_truth(tiny.test)
  statistics = average_precision.average_precision(
    truth, results_of(tiny, [0, 1])
  )
  # Precision 1 up to recall 2/3 is 67 of 101 recall levels.
  assert statistics["mask_ap"] == pytest.approx(67 / 101, abs=1e-12)
  assert statistics["mask_ar_100"] == pytest.approx(2 / 3, abs=1e-12)


def test_no_detections_have_ap_0(tiny):
  truth = average_precision.make_ground_truth(tiny.test)
  statistics = average_precision.average_precision(truth, [])
  assert statistics["box_ap"] == statistics["mask_ap"] == 0


def test_the_ground_truth_is_not_used_up(tiny):
  truth = average_precision.make_ground_truth(tiny.test)
  first, second = (
    average_precision.average_precision(truth, results_of(tiny, [1, 2]))
    for _ in range(2)
  )
  assert first == second


def test_results_are_json_that_pycocotools_reads(tiny, tmp_path):
  path = tmp_path / "results.json"
  path.write_text(json.dumps(results_of(tiny, range(3))))
  with contextlib.redirect_stdout(io.StringIO()):
    truth = coco_api.COCO(str(annotation_file(tmp_path / "tiny")))
    api = truth.loadRes(str(path))
  assert len(api.anns) == 9
  for index in range(3):
    anns = api.loadAnns(api.getAnnIds([10 + index]))
    assert [ann["category_id"] for ann in anns] == [3, 3, 7]
    for ann, mask in zip(anns, tiny_coco.masks_of(index), strict=False):
      assert ann["bbox"] == tiny_coco.box_of(mask)
      np.testing.assert_array_equal(coco_rle.decode(ann["segmentation"]), mask)


def test_labels_that_no_category_has_are_left_out(tiny):
  detections = whole(tiny.test.targets(0))
  labels = np.array([1, 2, 3])
  results = average_precision.to_results(
    detections._replace(labels=labels), 10, (0, 3, 0, 7)
  )
  assert [result["category_id"] for result in results] == [3, 7]


def test_pictures_show_what_is_confident(tiny):
  sure = whole(tiny.test.targets(0))
  scores = np.float32([0.4, 0.5, 0.9])
  kept = average_precision.confident(sure._replace(scores=scores), 0.5)
  np.testing.assert_array_equal(kept.boxes, sure.boxes[1:])
  np.testing.assert_array_equal(kept.masks, sure.masks[1:])
  assert kept.labels.tolist() == [1, 2]


def as_network(dataset: coco.DetectionDataset, *, num_rows: int = 5):
  """What a network that knows the answers gives: small masks, padded rows."""

  def detect(variables, batch) -> Found:
    count = len(batch["image_id"])
    # Padding that would be counted as sure detections of nothing.
    nothing = np.float32([0, 0, 5, 5])
    found = Found(
      np.tile(nothing, (count, num_rows, 1)),
      np.full((count, num_rows), 0.99, np.float32),
      np.ones((count, num_rows), np.int32),
      np.ones((count, num_rows, 28, 28), np.float32),
      np.zeros((count, num_rows), bool),
    )
    numbers = {image.id: i for i, image in enumerate(dataset.test.images)}
    for row, image_id in enumerate(batch["image_id"].tolist()):
      targets = dataset.test.targets(numbers[image_id])
      # Not the first rows: the valid ones may lie anywhere.
      rows = 1 + np.arange(len(targets.labels))
      found.boxes[row, rows] = targets.boxes
      found.scores[row, rows] = variables
      found.labels[row, rows] = targets.labels
      found.valid[row, rows] = True
      for place, box, mask in zip(
        rows, targets.boxes, targets.masks, strict=True
      ):
        found.masks[row, place] = inside(mask, box)
    return found

  return detect


def inside(mask: np.ndarray, box: np.ndarray) -> np.ndarray:
  """The mask at 28 x 28 places of the box, nearest pixel."""
  x1, y1, x2, y2 = box
  places = (np.arange(28) + 0.5) / 28
  rows = np.floor(y1 + places * (y2 - y1)).astype(int)
  columns = np.floor(x1 + places * (x2 - x1)).astype(int)
  return mask[np.ix_(rows, columns)]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_evaluation_of_a_network_that_knows_the_answers(tiny, batch_size):
  evaluate = average_precision.make_evaluate(as_network(tiny), tiny)
  batches = data.eval_batches(tiny, batch_size=batch_size)
  statistics = evaluate(0.7, batches)
  assert statistics["images"] == 3
  assert statistics["box_ap"] == pytest.approx(1, abs=1e-12)
  # Pasting rounds boxes to pixels, which costs discs of 10 pixels their rim.
  assert statistics["mask_ap50"] == pytest.approx(1, abs=1e-12)
  assert 0.5 < statistics["mask_ap"] < 1


def test_an_image_that_is_not_evaluated_is_an_error(tiny):
  evaluate = average_precision.make_evaluate(as_network(tiny), tiny)
  batches = list(data.eval_batches(tiny, batch_size=1))
  with pytest.raises(errors.InputError, match="2 of the 3 test images of tiny"):
    evaluate(0.7, batches[1:])

"""Average precision of detections.

By faster-coco-eval: the tests compare it with pycocotools, figure by figure. On
109 images with 5,883 detections it took 0.2 s where pycocotools took 4.0 s.
COCO's protocol (Lin et al., arXiv 1405.0312; cocodataset.org/#detection-eval)
looks at no more than `MOST_DETECTIONS` of an image and category, so a network
gains nothing from more.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import faster_coco_eval
import jax
import numpy as np

from pqf_jax import errors
from pqf_jax.data import coco
from pqf_jax.data.coco import masks as coco_masks
from pqf_jax.models.mask_rcnn import masks as mask_ops

PyTree = Any
Batch = Mapping[str, np.ndarray]
Result = dict[str, Any]
"""One detection of COCO's result format: `image_id`, `category_id`, `bbox`
[x, y, width, height] in pixels, `score` and `segmentation`, a compressed
run-length code. What `json` writes as it is."""

MOST_DETECTIONS = 100
# The order of COCO's statistics. AP is over IoU 0.50:0.05:0.95, ap50 and
# ap75 at one; small, medium and large are areas below 32 ** 2, below 96 ** 2
# and above; ar_N is recall with N detections an image.
STATISTICS = (
  "ap",
  "ap50",
  "ap75",
  "ap_small",
  "ap_medium",
  "ap_large",
  "ar_1",
  "ar_10",
  "ar_100",
  "ar_small",
  "ar_medium",
  "ar_large",
)
# COCO's name of what is compared, ours, and what a result must not have:
# with a box it would take the area of a mask from the box.
KINDS = (("bbox", "box", "segmentation"), ("segm", "mask", "bbox"))


class BatchDetections(Protocol):
  """Outputs of a detector for a batch, padded to N objects an image.

  Attributes:
    boxes: [B, N, 4], x1, y1, x2, y2 in pixels of the original image.
    scores: [B, N], 0 to 1.
    labels: [B, N], from 1 on.
    masks: [B, N, P, P] probabilities within the boxes.
    valid: bool [B, N]; the rest is padding, but not finite only where the
      network's outputs are not.
  """

  boxes: jax.Array
  scores: jax.Array
  labels: jax.Array
  masks: jax.Array
  valid: jax.Array


class Detections(NamedTuple):
  """The objects found in one image, on the host.

  Attributes:
    boxes: float32 [N, 4], x1, y1, x2, y2 in pixels.
    scores: float32 [N], 0 to 1.
    labels: int [N], from 1 on.
    masks: bool [N, H, W].
  """

  boxes: np.ndarray
  scores: np.ndarray
  labels: np.ndarray
  masks: np.ndarray


def finite_images(outputs: BatchDetections) -> np.ndarray:
  """Returns bool [B]: for which images all that was found is finite."""
  values = (outputs.boxes, outputs.scores, outputs.masks)
  finite = [np.isfinite(v).reshape(len(v), -1).all(1) for v in values]
  return np.logical_and.reduce(finite)


def refuse_images(damaged: Sequence[str], count: int) -> None:
  """Refuses what a network found if some of it is not finite.

  Args:
    damaged: names of the images with such outputs.
    count: of all images.

  Raises:
    InputError: there are such images; names the first.
  """
  if damaged:
    raise errors.InputError(
      f"outputs are not finite for {len(damaged)} of {count} images, first "
      f"{damaged[0]}; the weights are damaged, overflow, or their training "
      "diverged: use others"
    )


def image_detections(
  outputs: BatchDetections, row: int, size: np.ndarray
) -> Detections:
  """Returns the detections of one image, with masks of the image's size.

  Args:
    outputs: of the batch, on the host.
    row: of the image in the batch.
    size: its height and width, `size[row]` of the batch.
  """
  valid = np.flatnonzero(outputs.valid[row])
  boxes, scores, labels, masks = (
    np.asarray(values[row])[valid]
    for values in (outputs.boxes, outputs.scores, outputs.labels, outputs.masks)
  )
  height, width = map(int, size)
  pasted = mask_ops.paste_masks(masks, boxes, height, width)
  return Detections(boxes, scores, labels, pasted)


def confident(detections: Detections, least_score: float) -> Detections:
  """Returns the detections with this score or more."""
  kept = detections.scores >= least_score
  return Detections(*(values[kept] for values in detections))


def to_results(
  detections: Detections, image_id: int, category_ids: Sequence[int]
) -> list[Result]:
  """Converts the detections of one image to COCO's result format.

  Args:
    detections: of the image.
    image_id: as in the annotation file.
    category_ids: by label, see `coco.Labels`; labels that no category has are
      left out.
  """
  corners = detections.boxes
  # In the type of the boxes, as torchvision's evaluation.
  boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
  rows = zip(
    detections.labels.tolist(),
    boxes.tolist(),
    detections.scores.tolist(),
    coco_masks.encode(detections.masks),
    strict=True,
  )
  return [
    {
      "image_id": int(image_id),
      "category_id": category_ids[label],
      "bbox": box,
      "score": score,
      "segmentation": rle,
    }
    for label, box, score, rle in rows
    if category_ids[label]
  ]


def make_ground_truth(split: coco.Split) -> faster_coco_eval.COCO:
  """Indexes the annotations of a split, crowds included."""
  return faster_coco_eval.COCO(split.ground_truth())


def average_precision(
  ground_truth: faster_coco_eval.COCO, results: Sequence[Result]
) -> dict[str, float]:
  """Computes the 24 statistics of boxes and masks, from 0 to 1.

  Args:
    ground_truth: of all images that were evaluated.
    results: of all these images, in any order.

  Returns:
    {box_ap, box_ap50, ..., box_ar_large, mask_ap, ..., mask_ar_large}, -1 where
    no object has that size.
  """
  statistics: dict[str, float] = {}
  for kind, name, unwanted in KINDS:
    kept = [
      {field: value for field, value in result.items() if field != unwanted}
      for result in results
    ]
    evaluation = faster_coco_eval.COCOeval_faster(
      ground_truth, ground_truth.loadRes(kept), kind
    )
    evaluation.run()
    # It appends statistics of its own to COCO's twelve.
    values = map(float, evaluation.stats[: len(STATISTICS)])
    statistics |= {
      f"{name}_{statistic}": value
      for statistic, value in zip(STATISTICS, values, strict=True)
    }
  return statistics


def make_evaluate(
  detect: Callable[[PyTree, Batch], BatchDetections],
  dataset: coco.DetectionDataset,
  *,
  gather: Callable[[list[Any]], list[Any]] = list,
) -> Callable[[PyTree, Iterable[Batch]], dict[str, float]]:
  """Builds the evaluation over exactly the test images.

  Args:
    detect: (variables, batch) -> `BatchDetections`, on the device and not
      waited for.
    dataset: its `test` is the ground truth.
    gather: JSON list of this process -> the lists of all processes that share
      the images, joined.

  Returns:
    evaluate(variables, batches) -> the statistics of `average_precision`, and
    images; the batches are those of `data.eval_batches`. It raises `InputError`
    where outputs are not finite, or where the batches lack a test image.
  """
  ground_truth = make_ground_truth(dataset.test)
  names = {image.id: image.file_name for image in dataset.test.images}

  def evaluate(variables: PyTree, batches: Iterable[Batch]) -> dict[str, float]:
    results: list[Result] = []
    image_ids: list[int] = []
    damaged: list[str] = []
    for batch, outputs in _one_ahead(lambda b: detect(variables, b), batches):
      finite = finite_images(outputs)
      for row in np.flatnonzero(batch["mask"]).tolist():
        image_id = int(batch["image_id"][row])
        image_ids.append(image_id)
        if not finite[row]:
          damaged.append(names[image_id])
          continue
        detections = image_detections(outputs, row, batch["size"][row])
        category_ids = dataset.labels.category_ids
        results += to_results(detections, image_id, category_ids)
    results, image_ids = gather(results), gather(image_ids)
    refuse_images(gather(damaged), len(image_ids))
    if set(image_ids) != set(names):
      raise errors.InputError(
        f"the batches held {len(set(image_ids))} of the {len(names)} test "
        f"images of {dataset.name}; evaluate all of them"
      )
    return average_precision(ground_truth, results) | {"images": len(image_ids)}

  return evaluate


def _one_ahead(
  detect: Callable[[Batch], BatchDetections], batches: Iterable[Batch]
) -> Iterator[tuple[Batch, BatchDetections]]:
  """Runs the next batch on the device while the host pastes masks of this."""
  waiting: tuple[Batch, BatchDetections] | None = None
  for batch in batches:
    started = batch, detect(batch)
    if waiting is not None:
      yield waiting[0], jax.device_get(waiting[1])
    waiting = started
  if waiting is not None:
    yield waiting[0], jax.device_get(waiting[1])

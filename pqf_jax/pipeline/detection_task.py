"""Finding objects: the task as the stages see it, predictions and pictures."""

import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from pqf_jax import errors, finetune
from pqf_jax.data import coco
from pqf_jax.data.coco import batches as detection_batches
from pqf_jax.pipeline import training
from pqf_jax.report import drawings
from pqf_jax.runtime import distributed, files, progress
from pqf_jax.tasks import detection, detection_metrics

PyTree = Any
NUM_PICTURES = 3
# Those of `config.mode` that read training images.
TRAINING_MODES = ("compress", "train")
# What is less certain would only clutter a picture.
LEAST_SCORE = 0.5


def load(config: ml_collections.ConfigDict, module: Any) -> dict[str, Any]:
  """The fields of `tasks.Task`.

  Raises:
    InputError: the images or annotations are not there, damaged, or of another
      number of categories.
  """
  if config.distillation:
    raise errors.InputError(
      f"config.distillation is {config.distillation:g}; detection has no "
      "teacher, so give 0"
    )
  dataset = open_dataset(config, with_train=config.mode in TRAINING_MODES)
  for note in dataset.notes:
    progress.say(note)
  detect = make_detect(module)
  measure = detection_metrics.make_evaluate(
    detect, dataset, gather=distributed.collect
  )

  def evaluate(variables: PyTree) -> dict[str, float]:
    batches = detection_batches.eval_batches(
      dataset, batch_size=config.eval_batch_size, **distributed.share()
    )
    return measure(place(variables), batches)

  def train_batches(**order: Any) -> Iterator[finetune.Batch]:
    for batch in detection_batches.train_batches(
      dataset, **order, **distributed.share()
    ):
      del batch["image_id"]  # int64, which a device has not
      yield distributed.shard(batch)

  forward = functools.partial(
    training.trained(config, module).apply, method="training_outputs"
  )
  return {
    "num_train": len(dataset.train or ()),
    "train_batches": train_batches,
    "make_loss": lambda distillation: detection.make_loss(
      forward, axis=distributed.AXIS
    ),
    "make_teacher": lambda variables: lambda batch: batch,
    "evaluate": evaluate,
    "metric": "mask_ap",
    "pictures": functools.partial(
      pictures, detect, dataset, config.eval_batch_size
    ),
  }


def open_dataset(
  config: ml_collections.ConfigDict, *, with_train: bool
) -> coco.DetectionDataset:
  """The images of `config.data`."""
  return coco.load(
    config.data.dir,
    num_classes=config.model.num_classes,
    with_train=with_train,
    image_size=config.data.image_size or None,
    num_objects=config.data.num_objects or None,
  )


def make_detect(module: Any) -> Any:
  """(placed variables, batch) -> `detection_metrics.Found`.

  One process shares its batch among its devices. Of several, each looks at its
  own images, on one device, and tells the others what it found.
  """
  run = jax.jit(module.apply)

  def detect(variables: PyTree, batch: finetune.Batch) -> Any:
    inputs = {name: batch[name] for name in ("image", "size")}
    if jax.process_count() == 1 and len(batch["image"]) > 1:
      inputs = distributed.shard(inputs)
    return run(variables, inputs["image"], inputs["size"])

  return detect


def place(variables: PyTree) -> PyTree:
  """Variables where `make_detect` wants them."""
  return (
    distributed.replicate(variables) if jax.process_count() == 1 else variables
  )


def predict(
  config: ml_collections.ConfigDict,
  module: Any,
  variables: PyTree,
  folder: epath.Path,
) -> list[epath.Path]:
  """Finds the objects of `config.image`; names of the files written.

  Args:
    config: names of categories come from the annotations in its data folder,
      where one is given.
    module: the network.
    variables: its weights, compressed or dense.
    folder: where `detections.json`, in COCO's format, and `detections.png` go.
  """
  labels = (
    open_dataset(config, with_train=False).labels
    if config.data.dir
    else coco.unnamed_labels(config.model.num_classes)
  )
  batch = detection_batches.image_batch(config.image)
  found = jax.device_get(make_detect(module)(place(variables), batch))
  seen = detection_metrics.image_detections(found, 0, batch["size"][0])
  results = detection_metrics.to_results(seen, 0, labels.category_ids)
  height, width = batch["size"][0]
  picture = _draw(batch["image"][0, :height, :width], seen, labels.names)
  written = {
    folder / "detections.json": json.dumps(results).encode(),
    folder / "detections.png": drawings.side_by_side([(config.image, picture)]),
  }
  for path, content in written.items():
    files.write(path, content)
  return list(written)


def pictures(
  detect: Any,
  dataset: coco.DetectionDataset,
  batch_size: int,
  networks: Mapping[str, PyTree],
) -> list[bytes]:
  """PNG files of a few test images: what is there, and what networks find.

  Args:
    detect: see `make_detect`.
    dataset: its first test images are shown.
    batch_size: of the evaluation, so that nothing is compiled anew.
    networks: {title: variables}.
  """
  names = dataset.labels.names
  batch = next(
    detection_batches.eval_batches(
      dataset, batch_size=batch_size, **distributed.share()
    )
  )
  found = {
    title: jax.device_get(detect(place(variables), batch))
    for title, variables in networks.items()
  }
  sheets = []
  for row in range(min(NUM_PICTURES, int(batch["mask"].sum()))):
    height, width = batch["size"][row]
    pixels = batch["image"][row, :height, :width]
    truth = dataset.test.targets(row)
    texts = drawings.captions(truth.labels, names)
    annotated = drawings.draw_objects(pixels, truth.boxes, truth.masks, texts)
    panels = [("annotated", annotated)]
    for title, of_batch in found.items():
      seen = detection_metrics.image_detections(of_batch, row, (height, width))
      panels.append((title, _draw(pixels, seen, names)))
    sheets.append(drawings.side_by_side(panels))
  return sheets


def _draw(
  pixels: np.ndarray,
  seen: detection_metrics.Detections,
  names: tuple[str, ...],
) -> np.ndarray:
  seen = detection_metrics.confident(seen, LEAST_SCORE)
  texts = drawings.captions(seen.labels, names, seen.scores)
  return drawings.draw_objects(pixels, seen.boxes, seen.masks, texts)

"""Runs a detector on images: for the evaluation, for files, for pictures."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from pqf_jax import data
from pqf_jax.data import coco
from pqf_jax.data.coco import batches as detection_batches
from pqf_jax.models import contract as models
from pqf_jax.report import drawings
from pqf_jax.runtime import distributed, files
from pqf_jax.tasks.detection import average_precision

PyTree = Any
NUM_PICTURES = 3
# Less certain detections would only clutter a picture.
LEAST_SCORE = 0.5


def open_dataset(
  config: ml_collections.ConfigDict, *, with_train: bool
) -> coco.DetectionDataset:
  """Opens the images and annotations of `config.data`."""
  return coco.load(
    config.data.dir,
    num_classes=config.model.num_classes,
    with_train=with_train,
    image_size=config.data.image_size or None,
    num_objects=config.data.num_objects or None,
  )


DetectFn = Callable[[PyTree, average_precision.Batch], Any]
"""(variables from `place`, batch) -> `average_precision.BatchDetections`."""


def make_detect(network: models.Network) -> DetectFn:
  """Builds the jitted inference of a detector.

  A single process shares its batch among its devices. Each of several processes
  runs its own images on one device; their detections are gathered later.
  """
  run = jax.jit(network.apply)

  def detect(variables: PyTree, batch: average_precision.Batch) -> Any:
    inputs: dict[str, Any] = {name: batch[name] for name in ("image", "size")}
    if jax.process_count() == 1 and len(batch["image"]) > 1:
      inputs = distributed.shard(inputs)
    return run(variables, inputs["image"], inputs["size"])

  return detect


def place(variables: PyTree) -> PyTree:
  """Returns the variables on the devices where `make_detect` runs."""
  return (
    distributed.replicate(variables) if jax.process_count() == 1 else variables
  )


def predict(
  config: ml_collections.ConfigDict,
  network: models.Network,
  variables: PyTree,
  folder: epath.Path,
) -> list[epath.Path]:
  """Finds the objects in `config.image` and writes them as JSON and picture.

  Args:
    config: names of categories come from the annotations in its data folder,
      if it has one.
    network: the detector.
    variables: its weights, compressed or dense.
    folder: gets `detections.json`, in COCO's format, and `detections.png`.

  Returns:
    The files written.

  Raises:
    InputError: the image cannot be read, or the outputs are not finite.
  """
  labels = (
    open_dataset(config, with_train=False).labels
    if config.data.dir
    else coco.unnamed_labels(config.model.num_classes)
  )
  batch = detection_batches.image_batch(config.image)
  detect = make_detect(network)
  outputs = _look(detect, variables, batch, [config.image])
  detections = average_precision.image_detections(outputs, 0, batch["size"][0])
  results = average_precision.to_results(detections, 0, labels.category_ids)
  height, width = batch["size"][0]
  picture = _draw(batch["image"][0, :height, :width], detections, labels.names)
  written = {
    folder / "detections.json": json.dumps(results).encode(),
    folder / "detections.png": drawings.side_by_side([(config.image, picture)]),
  }
  for path, content in written.items():
    files.write(path, content)
  return list(written)


def pictures(
  detect: DetectFn,
  dataset: coco.DetectionDataset,
  batch_size: int,
  networks: Mapping[str, PyTree],
) -> list[bytes]:
  """Draws a few test images as PNG: annotated, and as each network sees them.

  Args:
    detect: see `make_detect`.
    dataset: its first test images are shown.
    batch_size: of the evaluation, so that nothing is compiled anew.
    networks: {title: variables}.

  Raises:
    InputError: the outputs for an image that is shown are not finite.
  """
  names = dataset.labels.names
  batch = next(
    data.eval_batches(dataset, batch_size=batch_size, **distributed.position())
  )
  count = min(NUM_PICTURES, int(batch["mask"].sum()))
  shown = [image.file_name for image in dataset.test.images[:count]]
  outputs_of = {
    title: _look(detect, variables, batch, shown)
    for title, variables in networks.items()
  }
  sheets = []
  for row in range(count):
    height, width = batch["size"][row]
    pixels = batch["image"][row, :height, :width]
    truth = dataset.test.targets(row)
    texts = drawings.captions(truth.labels.tolist(), names)
    annotated = drawings.draw_objects(pixels, truth.boxes, truth.masks, texts)
    panels = [("annotated", annotated)]
    for title, outputs in outputs_of.items():
      detections = average_precision.image_detections(
        outputs, row, np.array([height, width])
      )
      panels.append((title, _draw(pixels, detections, names)))
    sheets.append(drawings.side_by_side(panels))
  return sheets


def _look(
  detect: DetectFn,
  variables: PyTree,
  batch: average_precision.Batch,
  names: Sequence[str],
) -> average_precision.BatchDetections:
  """Returns what a network finds, on the host; `names` are of the images."""
  outputs = jax.device_get(detect(place(variables), batch))
  finite = average_precision.finite_images(outputs)[: len(names)]
  damaged = list(itertools.compress(names, ~finite))
  average_precision.refuse_images(damaged, len(names))
  return outputs


def _draw(
  pixels: np.ndarray,
  detections: average_precision.Detections,
  names: tuple[str, ...],
) -> np.ndarray:
  shown = average_precision.confident(detections, LEAST_SCORE)
  texts = drawings.captions(shown.labels.tolist(), names, shown.scores.tolist())
  return drawings.draw_objects(pixels, shown.boxes, shown.masks, texts)

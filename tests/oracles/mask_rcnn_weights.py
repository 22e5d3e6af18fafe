"""Names, shapes, random weights and images for torchvision's Mask R-CNN."""

import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from tests.oracles import resnet_weights

Shapes = dict[str, tuple[int, ...]]
Size = tuple[int, int]


class Case(NamedTuple):
  """A network and the images that it is run on.

  Attributes:
    depth: of the ResNet.
    num_classes: with background.
    min_size: length that the short side is scaled to.
    max_size: bound of the long side.
    num_proposals: boxes that the heads read.
    num_detections: bound of the detected objects.
    sizes: of the images.
    buffer: side of the square that the images lie in.
  """

  depth: int
  num_classes: int
  min_size: int
  max_size: int
  num_proposals: int
  num_detections: int
  sizes: tuple[Size, ...]
  buffer: int


# A wide and a high image, a square that does not become min_size, and one so
# long that max_size decides.
SMALL = Case(
  18, 5, 96, 160, 100, 30, ((60, 80), (80, 61), (47, 47), (40, 100)), 104
)
DEEP = Case(50, 91, 64, 96, 50, 25, ((48, 64),), 64)
# Two images of one padded size, as torchvision pads a batch to the largest.
TRAINING = Case(18, 5, 64, 96, 100, 30, ((50, 64), (50, 62)), 64)
NUM_OBJECTS = (4, 2)
# Sampled anchors, boxes and masks of an image.
NUM_ANCHORS, NUM_BOXES, NUM_MASKS = 64, 32, 8
# Factors of kernels, so that scores differ, boxes move and masks have edges.
GAINS = {
  "bn2": 0.5,
  "bn3": 0.3,
  "fpn.inner_blocks": 0.2,
  "rpn.head.cls_logits": 0.5,
  "rpn.head.bbox_pred": 0.1,
  "box_head.fc6": 0.7,
  "box_predictor.cls_score": 0.6,
  "box_predictor.bbox_pred": 0.7,
  "mask_predictor.mask_fcn_logits": 3.0,
}


def shapes(depth: int, num_classes: int) -> Shapes:
  """Returns {name: shape} of torchvision's first weights."""
  body = resnet_weights.shapes(depth, num_classes, "imagenet")
  named = {
    f"backbone.body.{name}": shape
    for name, shape in body.items()
    if not name.startswith("fc.")
  }
  named.update(_heads(4 if depth == 50 else 1, num_classes))
  return named


def _heads(
  expansion: int, num_classes: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
  for i in range(4):
    c_in = 64 * 2**i * expansion
    yield from _layer(f"backbone.fpn.inner_blocks.{i}", 256, c_in, 1, 1)
    yield from _layer(f"backbone.fpn.layer_blocks.{i}", 256, 256, 3, 3)
  yield from _layer("rpn.head.conv", 256, 256, 3, 3)
  yield from _layer("rpn.head.cls_logits", 3, 256, 1, 1)
  yield from _layer("rpn.head.bbox_pred", 12, 256, 1, 1)
  heads = "roi_heads."
  yield from _layer(f"{heads}box_head.fc6", 1024, 256 * 49)
  yield from _layer(f"{heads}box_head.fc7", 1024, 1024)
  yield from _layer(f"{heads}box_predictor.cls_score", num_classes, 1024)
  yield from _layer(f"{heads}box_predictor.bbox_pred", 4 * num_classes, 1024)
  for i in range(1, 5):
    yield from _layer(f"{heads}mask_head.mask_fcn{i}", 256, 256, 3, 3)
  predictor = f"{heads}mask_predictor."
  # The weight of a transposed convolution is [in, out, h, w].
  yield from _layer(f"{predictor}conv5_mask", 256, 256, 2, 2)
  name = f"{predictor}mask_fcn_logits"
  yield from _layer(name, num_classes, 256, 1, 1)


def _layer(name: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
  yield f"{name}.weight", shape
  yield f"{name}.bias", shape[:1]


def draw(depth: int, num_classes: int) -> dict[str, np.ndarray]:
  """Draws float64 weights, each from a seed made of its name alone."""
  weights = resnet_weights.draw(shapes(depth, num_classes))
  for name, array in weights.items():
    if name.endswith("weight"):
      array *= next((g for part, g in GAINS.items() if part in name), 1)
    elif name.endswith("bias") and "body" not in name:
      array *= 0.1
  return weights


def rename(weights: dict[str, Any]) -> dict[str, Any]:
  """Gives weights the names of torchvision 0.13 and later."""

  def new(name: str) -> str:
    *modules, entry = name.split(".")
    if "blocks" in name or name.startswith("rpn.head.conv."):
      count = 1 if "blocks" in name else 2
      return ".".join([*modules, *["0"] * count, entry])
    if "mask_fcn" in modules[-1] and "logits" not in name:
      index = int(modules[-1].removeprefix("mask_fcn")) - 1
      return ".".join([*modules[:-1], str(index), "0", entry])
    return name

  return {new(name): array for name, array in weights.items()}


def first_names() -> dict[str, str]:
  """Returns {name in torchvision 0.13 and later: first name}."""
  names = shapes(18, 2).keys() | shapes(50, 2).keys()
  return rename({name: name for name in names})


def image(height: int, width: int, seed: int) -> np.ndarray:
  """Draws discs and rectangles on waves, uint8 [height, width, 3]."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[:height, :width].astype(np.float64)
  wave = np.sin(x / rng.uniform(8, 40)) * np.cos(y / rng.uniform(8, 40))
  picture = 0.4 + 0.2 * wave[..., None] + rng.normal(0, 0.03, (*x.shape, 3))
  for _ in range(12):
    dx, dy = abs(x - rng.uniform(0, width)), abs(y - rng.uniform(0, height))
    a, b = rng.uniform(8, width / 4), rng.uniform(8, height / 4)
    disc = (dx / a) ** 2 + (dy / b) ** 2 < 1
    inside = disc if rng.random() < 0.5 else (dx < a) & (dy < b)
    picture[inside] = rng.uniform(0, 1, 3)
  return (255 * np.clip(picture, 0, 1)).astype(np.uint8)


def batch(
  sizes: Sequence[Size], buffer: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """Draws images of these sizes, uint8 [B, buffer, buffer, 3], int32 [B, 2]."""
  images = np.zeros((len(sizes), buffer, buffer, 3), np.uint8)
  for i, (height, width) in enumerate(sizes):
    images[i, :height, :width] = image(height, width, seed + i)
  return images, np.asarray(sizes, np.int32)


def objects(
  sizes: Sequence[Size], buffer: int, counts: Sequence[int], padded: int
) -> dict[str, np.ndarray]:
  """Draws ellipses as objects of these images, as in training batches."""
  rng = np.random.default_rng(7)
  lead = (len(sizes), padded)
  boxes, labels = np.zeros((*lead, 4), np.float32), np.zeros(lead, np.int32)
  valid, masks = np.zeros(lead, bool), np.zeros((*lead, buffer, buffer), bool)
  y, x = np.mgrid[:buffer, :buffer] + 0.5
  for b, ((height, width), count) in enumerate(zip(sizes, counts, strict=True)):
    for g in range(count):
      low = rng.uniform(0, 0.6, 2) * [width, height]
      high = low + rng.uniform(0.15, 0.4, 2) * [width, height]
      boxes[b, g] = [*low, *high]
      center, half = (low + high) / 2, (high - low) / 2
      masks[b, g] = ((x - center[0]) / half[0]) ** 2 + (
        (y - center[1]) / half[1]
      ) ** 2 < 1
      labels[b, g], valid[b, g] = rng.integers(1, 4), True
  packed = np.packbits(masks, axis=-1)
  return {"boxes": boxes, "labels": labels, "valid": valid, "masks": packed}


def training_batch() -> dict[str, np.ndarray]:
  """Returns the batch of `TRAINING`."""
  images, sizes = batch(TRAINING.sizes, TRAINING.buffer)
  truth = objects(TRAINING.sizes, TRAINING.buffer, NUM_OBJECTS, 6)
  return {"image": images, "size": sizes, **truth}


def summarize(gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns {name: (norm, inner product with a random direction)}."""
  return {
    name: np.asarray(
      [np.linalg.norm(array), np.vdot(array, signs(name, array.shape))]
    )
    for name, array in gradients.items()
  }


def signs(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Draws the random direction of `summarize`, each entry -1 or 1."""
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  return rng.choice([-1.0, 1.0], shape)

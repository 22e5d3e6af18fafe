"""Names, shapes and random values of torchvision's ResNet state dicts."""

import zlib
from collections.abc import Iterator

import numpy as np

LENGTHS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}
Shapes = dict[str, tuple[int, ...]]

# {case: (depth, stem, (height, width))}. Even sides distinguish symmetric
# padding from 'SAME', odd sides floor from ceil, and unequal sides height from
# width.
CASES = {
  "18_imagenet": (18, "imagenet", (64, 57)),
  "18_small": (18, "small", (16, 13)),
  "50_imagenet": (50, "imagenet", (64, 57)),
  "50_small": (50, "small", (16, 13)),
}
TRAIN_CASE = "18_small"
TRAIN_STATISTICS = (
  "bn1.running_mean",
  "bn1.running_var",
  "layer2.0.downsample.1.running_mean",
  "layer2.0.downsample.1.running_var",
)


def shapes(depth: int, num_classes: int, stem: str) -> Shapes:
  """Returns torchvision's {name: shape} without num_batches_tracked."""
  return dict(_shapes(depth, num_classes, stem))


def _shapes(
  depth: int, num_classes: int, stem: str
) -> Iterator[tuple[str, tuple[int, ...]]]:
  size = 7 if stem == "imagenet" else 3
  yield "conv1.weight", (64, 3, size, size)
  yield from _norm("bn1", 64)
  expansion = 4 if depth == 50 else 1
  c_in = 64
  for stage, length in enumerate(LENGTHS[depth], start=1):
    width = (64, 128, 256, 512)[stage - 1]
    c_out = width * expansion
    for block in range(length):
      name = f"layer{stage}.{block}"
      convs = (
        [(c_in, width, 3), (width, width, 3)]
        if depth == 18
        else [(c_in, width, 1), (width, width, 3), (width, c_out, 1)]
      )
      for i, (n_in, n_out, k) in enumerate(convs, start=1):
        yield f"{name}.conv{i}.weight", (n_out, n_in, k, k)
        yield from _norm(f"{name}.bn{i}", n_out)
      if block == 0 and c_in != c_out:
        yield f"{name}.downsample.0.weight", (c_out, c_in, 1, 1)
        yield from _norm(f"{name}.downsample.1", c_out)
      c_in = c_out
  yield "fc.weight", (num_classes, c_in)
  yield "fc.bias", (num_classes,)


def _norm(name: str, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
  for entry in ("weight", "bias", "running_mean", "running_var"):
    yield f"{name}.{entry}", (size,)


def draw(names: Shapes) -> dict[str, np.ndarray]:
  """Draws float64 weights, each from a seed made of its name alone.

  Kernels keep the size of activations; norms are far from the identity.
  """
  return {name: _draw(name, shape) for name, shape in names.items()}


def _draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
  uniform = np.random.default_rng(zlib.crc32(name.encode())).random(shape)
  if len(shape) > 1:
    return (2 * uniform - 1) * np.sqrt(6 / np.prod(shape[1:]))
  if name.endswith(("running_mean", "bias")):
    return uniform - 0.5
  return uniform + 0.5


def images(*shape: int) -> np.ndarray:
  """Draws float64 images in [-2, 2)."""
  return 4 * np.random.default_rng(0).random(shape) - 2

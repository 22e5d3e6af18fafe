"""State dicts of MobileNetV2 (torchvision) and EfficientNet-Lite0 (timm).

Names and shapes are written out from the tables of the papers;
`resnet_weights.draw` draws random values.
"""

from collections.abc import Iterator, Sequence

NUM_CLASSES = 10
# Even sides distinguish symmetric padding from 'SAME', odd sides floor from
# ceil, and unequal sides height from width.
IMAGE_SHAPE = (2, 40, 37, 3)
Shapes = dict[str, tuple[int, ...]]
Entries = Iterator[tuple[str, tuple[int, ...]]]
Stages = Sequence[Sequence[tuple[int, int, int]]]

# (output channels, stride), block by block.
MOBILENET_V2 = (
  [(16, 1), (24, 2), (24, 1), (32, 2), (32, 1), (32, 1), (64, 2)]
  + [(64, 1)] * 3
  + [(96, 1)] * 3
  + [(160, 2), (160, 1), (160, 1), (320, 1)]
)
# (output channels, stride, kernel size), block by block and stage by stage.
EFFICIENTNET_LITE0 = (
  [(16, 1, 3)],
  [(24, 2, 3), (24, 1, 3)],
  [(40, 2, 5), (40, 1, 5)],
  [(80, 2, 3), (80, 1, 3), (80, 1, 3)],
  [(112, 1, 5)] * 3,
  [(192, 2, 5)] + [(192, 1, 5)] * 3,
  [(320, 1, 3)],
)


def mobilenet_v2(num_classes: int = NUM_CLASSES) -> Shapes:
  """Returns torchvision's {name: shape} without num_batches_tracked."""
  return dict(_mobilenet_v2(num_classes))


def _mobilenet_v2(num_classes: int) -> Entries:
  yield from _layer("features.0.0", "features.0.1", (32, 3, 3, 3))
  c_in = 32
  for i, (c_out, _) in enumerate(MOBILENET_V2, start=1):
    name = f"features.{i}.conv"
    inner = c_in if i == 1 else 6 * c_in
    j = 0
    if i > 1:
      yield from _layer(f"{name}.0.0", f"{name}.0.1", (inner, c_in, 1, 1))
      j = 1
    yield from _layer(f"{name}.{j}.0", f"{name}.{j}.1", (inner, 1, 3, 3))
    shape = (c_out, inner, 1, 1)
    yield from _layer(f"{name}.{j + 1}", f"{name}.{j + 2}", shape)
    c_in = c_out
  yield from _layer("features.18.0", "features.18.1", (1280, 320, 1, 1))
  yield "classifier.1.weight", (num_classes, 1280)
  yield "classifier.1.bias", (num_classes,)


def efficientnet_lite0(num_classes: int = NUM_CLASSES) -> Shapes:
  """Returns timm's {name: shape} without num_batches_tracked."""
  return dict(_of_timm(EFFICIENTNET_LITE0, num_classes))


def mobilenet_v2_of_timm(num_classes: int = NUM_CLASSES) -> Shapes:
  """Returns timm's {name: shape}, in the order of torchvision's."""
  lengths, blocks = (1, 2, 3, 4, 3, 3, 1), iter(MOBILENET_V2)
  stages = [[(*next(blocks), 3) for _ in range(length)] for length in lengths]
  return dict(_of_timm(stages, num_classes))


def _of_timm(stages: Stages, num_classes: int) -> Entries:
  yield from _layer("conv_stem", "bn1", (32, 3, 3, 3))
  c_in = 32
  for stage, blocks in enumerate(stages):
    for i, (c_out, _, size) in enumerate(blocks):
      name = f"blocks.{stage}.{i}"
      inner = c_in if stage == 0 else 6 * c_in
      shapes = [(inner, 1, size, size), (c_out, inner, 1, 1)]
      names = ["conv_dw", "conv_pw"]
      if stage > 0:
        shapes.insert(0, (inner, c_in, 1, 1))
        names = ["conv_pw", "conv_dw", "conv_pwl"]
      for j, (conv, shape) in enumerate(zip(names, shapes, strict=True)):
        yield from _layer(f"{name}.{conv}", f"{name}.bn{j + 1}", shape)
      c_in = c_out
  yield from _layer("conv_head", "bn2", (1280, 320, 1, 1))
  yield "classifier.weight", (num_classes, 1280)
  yield "classifier.bias", (num_classes,)


def _layer(conv: str, norm: str, shape: tuple[int, ...]) -> Entries:
  yield f"{conv}.weight", shape
  for entry in ("weight", "bias", "running_mean", "running_var"):
    yield f"{norm}.{entry}", (shape[0],)

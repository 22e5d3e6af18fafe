"""MobileNetV2 (arXiv 1801.04381) of width 1 as in torchvision.

Variables have torchvision's names: `features.1.conv.0.0.weight` is
`params/features/1/conv/0/0/kernel`; files may also have timm's, of
`mobilenetv2_100`. Maps are [B, H, W, C]. The dropout before the classifier is
left out: a network whose weights are codes is fine-tuned for few epochs and
underfits rather than overfits.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from pqf_jax.models import layers, torch_names

PyTree = Any

# Expansion, output channels, number of blocks, stride of the first (Table 2).
BLOCKS = (
  (1, 16, 1, 1),
  (6, 24, 2, 2),
  (6, 32, 3, 2),
  (6, 64, 4, 2),
  (6, 96, 3, 1),
  (6, 160, 3, 2),
  (6, 320, 1, 1),
)
STEM = 32
HEAD = 1280


class InvertedResidual(nn.Module):
  """Expansion, depthwise convolution and projection, plus x if shapes agree."""

  convs: tuple[layers.Layer, ...]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, H, W, C] to the output shape of the last convolution."""
    y = layers.Chain(self.convs, name="conv")(x)
    return x + y if x.shape == y.shape else y


class MobileNetV2(nn.Module):
  """The network; `make` describes the settings and checks them."""

  num_classes: int
  dtype: DTypeLike = jnp.float32
  norm_epsilon: float = 1e-5
  norm_axis: str | None = None

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    """Maps images [B, H, W, 3] to logits [B, num_classes], float32 or wider.

    With `train` the norms use the statistics of the batch, over the devices of
    `norm_axis`; see `layers.batch_norm`.
    """
    wide = layers.at_least_float32(self.dtype)
    x = layers.Chain(tuple(self._features(train)), name="features")(images)
    x = jnp.mean(x, (1, 2), dtype=wide)
    dropout = layers.stateless(lambda x: x)  # number 0 in torchvision
    dense = functools.partial(layers.dense, self.num_classes, dtype=wide)
    return layers.Chain((dropout, dense), name="classifier")(x)

  def _features(self, train: bool) -> Iterator[layers.Layer]:
    conv = functools.partial(layers.convolution, dtype=self.dtype)
    norm = functools.partial(
      layers.batch_norm,
      train=train,
      epsilon=self.norm_epsilon,
      dtype=self.dtype,
      axis=self.norm_axis,
    )

    def activated(
      size: int, features: int, stride: int = 1, groups: int = 1
    ) -> layers.Layer:
      first = functools.partial(conv, size, features, stride, groups=groups)
      chain = (first, norm, layers.stateless(nn.relu6))
      return functools.partial(layers.Chain, chain)

    yield activated(3, STEM, 2)
    channels = STEM
    for expansion, features, length, first_stride in BLOCKS:
      for i in range(length):
        inner = expansion * channels
        expand = (activated(1, inner),) if expansion > 1 else ()
        deep = activated(3, inner, 1 if i else first_stride, groups=inner)
        project = functools.partial(conv, 1, features, 1)
        convs = (*expand, deep, project, norm)
        yield functools.partial(InvertedResidual, convs)
        channels = features
    yield activated(1, HEAD)


def make(*, num_classes: int, dtype: DTypeLike = jnp.float32) -> MobileNetV2:
  """Builds the network.

  Args:
    num_classes: length of the logits.
    dtype: floating type of the computation.

  Raises:
    InputError: a setting has an unsupported value.
  """
  layers.check_settings("MobileNetV2", num_classes, dtype)
  return MobileNetV2(num_classes, dtype)


def load_torch(state_dict: Mapping[str, Any], template: PyTree) -> PyTree:
  """Maps a state dict with torchvision's or timm's names to variables.

  See `torch_names`.
  """
  return torch_names.torch_to_flax(arrange(state_dict), template)


def arrange(state_dict: Mapping[str, Any]) -> torch_names.StateDict:
  """Returns a state dict with torchvision's names."""
  return torch_names.rename_modules(state_dict, _torchvision_names())


def _torchvision_names() -> dict[str, str]:
  """Returns {module's name in timm's mobilenetv2_100: in torchvision}."""
  names = {
    "conv_stem": "features.0.0",
    "bn1": "features.0.1",
    "conv_head": "features.18.0",
    "bn2": "features.18.1",
    "classifier": "classifier.1",
  }
  number = 1
  for i, (expansion, _, length, _) in enumerate(BLOCKS):
    convs = ["conv_dw", "conv_pw"]
    if expansion > 1:
      convs = ["conv_pw", "conv_dw", "conv_pwl"]
    last = len(convs) - 1
    for j in range(length):
      old, new = f"blocks.{i}.{j}", f"features.{number}.conv"
      for k, layer in enumerate(convs):
        # A convolution and its norm are one module, but for the last ones.
        conv, norm = (f"{k}", f"{k + 1}") if k == last else (f"{k}.0", f"{k}.1")
        names[f"{old}.{layer}"] = f"{new}.{conv}"
        names[f"{old}.bn{k + 1}"] = f"{new}.{norm}"
      number += 1
  return names

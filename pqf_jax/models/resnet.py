"""ResNet v1.5: deep residual networks (arXiv 1512.03385) as in torchvision.

In "v1.5" the 3x3 convolution of a bottleneck has the stride. Variables have
torchvision's names: `layer1.0.conv1.weight` is `params/layer1/0/conv1/kernel`.
Maps are [B, H, W, C]: B images, H x W positions, C channels.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from pqf_jax.models import layers, torch_names

PyTree = Any
Conv = tuple[int, int, int]
"""Kernel size, output channels, stride."""


def basic(features: int, stride: int) -> tuple[Conv, ...]:
  """Returns the convolutions of a block of the shallow networks."""
  return (3, features, stride), (3, features, 1)


def bottleneck(features: int, stride: int) -> tuple[Conv, ...]:
  """Returns the convolutions of a block of the deep networks."""
  return (1, features, 1), (3, features, stride), (1, 4 * features, 1)


DEPTHS = {
  18: (basic, (2, 2, 2, 2)),
  34: (basic, (3, 4, 6, 3)),
  50: (bottleneck, (3, 4, 6, 3)),
  101: (bottleneck, (3, 4, 23, 3)),
  152: (bottleneck, (3, 8, 36, 3)),
}
STEMS = {"imagenet": (7, 64, 2), "small": (3, 64, 1)}


class Block(nn.Module):
  """relu(shortcut(x) + convolutions(x)) with a norm after every convolution."""

  convs: tuple[Conv, ...]
  conv: layers.Layer
  norm: layers.Layer

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, H, W, C] to the output shape of the last convolution."""
    y = x
    for i, settings in enumerate(self.convs, start=1):
      y = nn.relu(y) if i > 1 else y
      y = self.conv(*settings, name=f"conv{i}")(y)
      y = self.norm(name=f"bn{i}")(y)
    if x.shape != y.shape:
      features, stride = y.shape[-1], max(conv[2] for conv in self.convs)
      shortcut = functools.partial(self.conv, 1, features, stride), self.norm
      x = layers.Chain(shortcut, name="downsample")(x)
    return nn.relu(x + y)


class ResNet(nn.Module):
  """The network; `make` describes the settings and checks them."""

  depth: int
  num_classes: int
  stem: str = "imagenet"
  dtype: DTypeLike = jnp.float32
  norm_epsilon: float = 1e-5
  norm_axis: str | None = None

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    """Maps images [B, H, W, 3] to logits [B, num_classes], float32 or wider.

    With `train` the norms use the statistics of the batch, over the devices of
    `norm_axis`; see `layers.batch_norm`.
    """
    conv = functools.partial(layers.convolution, dtype=self.dtype)
    norm = functools.partial(
      layers.batch_norm,
      train=train,
      epsilon=self.norm_epsilon,
      dtype=self.dtype,
      axis=self.norm_axis,
    )
    x = feature_maps(images, self.depth, conv, norm, stem=self.stem)[-1]
    wide = layers.at_least_float32(self.dtype)
    x = jnp.mean(x, (1, 2), dtype=wide)
    return layers.dense(self.num_classes, dtype=wide, name="fc")(x)


def feature_maps(
  images: jax.Array,
  depth: int,
  conv: layers.Layer,
  norm: layers.Layer,
  *,
  stem: str = "imagenet",
) -> list[jax.Array]:
  """Computes the outputs of the four stages; a classifier reads the last.

  The compact method that calls this becomes the parent of all layers.

  Args:
    images: [B, H, W, 3].
    depth: see `make`.
    conv: `layers.convolution` with its dtype.
    norm: `layers.batch_norm` with all its settings.
    stem: see `make`.
  """
  x = conv(*STEMS[stem], name="conv1")(images)
  x = nn.relu(norm(name="bn1")(x))
  if stem == "imagenet":
    x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))

  maps = []
  block, lengths = DEPTHS[depth]
  for i, length in enumerate(lengths):
    features, stride = 64 * 2**i, 1 if i == 0 else 2
    first, rest = block(features, stride), block(features, 1)
    blocks = tuple(
      functools.partial(Block, convs, conv, norm)
      for convs in (first,) + (rest,) * (length - 1)
    )
    x = layers.Chain(blocks, name=f"layer{i + 1}")(x)
    maps.append(x)
  return maps


def make(
  *,
  depth: int,
  num_classes: int,
  stem: str = "imagenet",
  dtype: DTypeLike = jnp.float32,
) -> ResNet:
  """Builds the network.

  Args:
    depth: number of layers: 18, 34, 50, 101 or 152.
    num_classes: length of the logits.
    stem: 'imagenet', a 7x7 convolution of stride 2 and max-pooling, or 'small',
      a 3x3 convolution of stride 1 for images of about 32 x 32.
    dtype: floating type of the computation.

  Raises:
    InputError: a setting has an unsupported value.
  """
  layers.check_choice("ResNet", "depth", depth, tuple(DEPTHS))
  layers.check_choice("ResNet", "stem", stem, tuple(STEMS))
  layers.check_settings("ResNet", num_classes, dtype)
  return ResNet(depth, num_classes, stem, dtype)


def load_torch(state_dict: Mapping[str, Any], template: PyTree) -> PyTree:
  """Maps torchvision's state dict to variables; see `torch_names`."""
  return torch_names.torch_to_flax(state_dict, template)

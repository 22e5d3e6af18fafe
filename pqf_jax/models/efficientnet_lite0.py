"""EfficientNet-Lite0: EfficientNet-B0 (arXiv 1905.11946) for small devices.

It has ReLU6 instead of swish, and no squeeze-and-excitation. It was trained in
TensorFlow, hence 'SAME' padding, norms with epsilon 1e-3, and images normalized
as (x - 127) / 128 for x in 0..255. Variables have the names of timm's
`tf_efficientnet_lite0`: `blocks.1.0.conv_dw.weight` is
`params/blocks/1/0/conv_dw/kernel`. Maps are [B, H, W, C]. Dropout and drop-path
are left out: a network whose weights are codes is fine-tuned for few epochs and
underfits rather than overfits.
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

# Expansion, kernel size, output channels, number of blocks, stride of the first
# (Table 1 of the paper, for B0).
STAGES = (
  (1, 3, 16, 1, 1),
  (6, 3, 24, 2, 2),
  (6, 5, 40, 2, 2),
  (6, 3, 80, 3, 2),
  (6, 5, 112, 3, 1),
  (6, 5, 192, 4, 2),
  (6, 3, 320, 1, 1),
)
STEM = 32
HEAD = 1280

# {module's name in the package efficientnet_pytorch: in timm}. The block of the
# first stage does not expand; timm numbers its remaining layers from 1.
RENAMED = {
  "_conv_stem": "conv_stem",
  "_bn0": "bn1",
  "_conv_head": "conv_head",
  "_bn1": "bn2",
  "_fc": "classifier",
}
RENAMED_IN_BLOCK = {
  1: {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
  },
  6: {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
  },
}


class Block(nn.Module):
  """Expansion, depthwise convolution and projection, plus x if shapes agree."""

  expansion: int
  size: int
  features: int
  stride: int
  conv: layers.Layer
  norm: layers.Layer

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns [B, ceil(H / stride), ceil(W / stride), features]."""
    inner = self.expansion * x.shape[-1]
    expand = functools.partial(self.conv, 1, inner, 1)
    deep = functools.partial(
      self.conv, self.size, inner, self.stride, groups=inner
    )
    project = functools.partial(self.conv, 1, self.features, 1)
    convs = (
      {"conv_dw": deep, "conv_pw": project}
      if self.expansion == 1
      else {"conv_pw": expand, "conv_dw": deep, "conv_pwl": project}
    )
    y = x
    for i, (name, conv) in enumerate(convs.items(), start=1):
      y = nn.relu6(y) if i > 1 else y
      y = self.norm(name=f"bn{i}")(conv(name=name)(y))
    return x + y if x.shape == y.shape else y


class EfficientNetLite0(nn.Module):
  """The network; `make` describes the settings and checks them."""

  num_classes: int
  dtype: DTypeLike = jnp.float32
  norm_epsilon: float = 1e-3
  norm_axis: str | None = None

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    """Maps images [B, H, W, 3] to logits [B, num_classes], float32 or wider.

    With `train` the norms use the statistics of the batch, over the devices of
    `norm_axis`; see `layers.batch_norm`.
    """
    conv = functools.partial(
      layers.convolution, padding="SAME", dtype=self.dtype
    )
    norm = functools.partial(
      layers.batch_norm,
      train=train,
      epsilon=self.norm_epsilon,
      dtype=self.dtype,
      axis=self.norm_axis,
    )
    x = conv(3, STEM, 2, name="conv_stem")(images)
    x = nn.relu6(norm(name="bn1")(x))
    x = layers.Chain(_stages(conv, norm), name="blocks")(x)
    x = conv(1, HEAD, 1, name="conv_head")(x)
    x = nn.relu6(norm(name="bn2")(x))
    wide = layers.at_least_float32(self.dtype)
    x = jnp.mean(x, (1, 2), dtype=wide)
    return layers.dense(self.num_classes, dtype=wide, name="classifier")(x)


def _stages(conv: layers.Layer, norm: layers.Layer) -> tuple[layers.Layer, ...]:
  """Returns the stages, each a chain of blocks."""
  stages = []
  for expansion, size, features, length, first_stride in STAGES:
    blocks = tuple(
      functools.partial(Block, expansion, size, features, stride, conv, norm)
      for stride in (first_stride,) + (1,) * (length - 1)
    )
    stages.append(functools.partial(layers.Chain, blocks))
  return tuple(stages)


def make(
  *, num_classes: int, dtype: DTypeLike = jnp.float32
) -> EfficientNetLite0:
  """Builds the network.

  Args:
    num_classes: length of the logits.
    dtype: floating type of the computation.

  Raises:
    InputError: a setting has an unsupported value.
  """
  layers.check_settings("EfficientNet-Lite0", num_classes, dtype)
  return EfficientNetLite0(num_classes, dtype)


def load_torch(state_dict: Mapping[str, Any], template: PyTree) -> PyTree:
  """Maps a state dict with timm's or efficientnet_pytorch's names to variables.

  See `torch_names`.
  """
  return torch_names.torch_to_flax(arrange(state_dict), template)


def arrange(state_dict: Mapping[str, Any]) -> torch_names.StateDict:
  """Returns a state dict with timm's names."""
  return torch_names.rename_modules(state_dict, _timm_names())


def _timm_names() -> dict[str, str]:
  """Returns {module's name in efficientnet_pytorch: in timm}."""
  names = dict(RENAMED)
  number = 0  # efficientnet_pytorch counts blocks through all stages
  for i, (expansion, _, _, length, _) in enumerate(STAGES):
    for j in range(length):
      for old, new in RENAMED_IN_BLOCK[expansion].items():
        names[f"_blocks.{number}.{old}"] = f"blocks.{i}.{j}.{new}"
      number += 1
  return names

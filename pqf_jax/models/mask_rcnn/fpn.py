"""Feature pyramid (arXiv 1612.03144) over a ResNet, for images of any size.

Images lie in the top left of a common canvas. A convolution pads with zeros, so
each image is processed as if it were alone if everything outside of it is set
to zero again before each layer that reads there. Results then depend neither on
the canvas nor on the other images of a batch; torchvision's depend on both.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from pqf_jax.models import layers, resnet

STRIDE = 32
"""Stride of the body's coarsest map; images are padded to its multiples."""


class ImageArea:
  """The area that each image of a batch covers, in maps of any stride."""

  def __init__(self, sizes: jax.Array, canvas: tuple[int, int]):
    """Stores sizes int [B, 2] and the canvas, both multiples of 32."""
    self.sizes = sizes
    self.canvas = canvas

  def zero_outside(self, x: jax.Array) -> jax.Array:
    """Sets maps [B, H, W, C] to zero outside of the images."""
    length = jnp.asarray(x.shape[1:3], self.sizes.dtype)[None]
    # Exact: both are multiples of the stride.
    inside = self.sizes * length // jnp.asarray(self.canvas)[None]
    rows = jnp.arange(x.shape[1])[None, :] < inside[:, :1]
    columns = jnp.arange(x.shape[2])[None, :] < inside[:, 1:]
    mask = rows[:, :, None, None] & columns[:, None, :, None]
    return jnp.where(mask, x, 0)


class Body(nn.Module):
  """The feature maps of a ResNet whose norms use their running statistics."""

  depth: int
  norm_epsilon: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, images: jax.Array, area: ImageArea) -> list[jax.Array]:
    """Maps images [B, H, W, 3] to maps of strides 4, 8, 16 and 32."""

    # Only kernels larger than one pixel read outside of the images. Max-pooling
    # does so too at the far borders, but this never reaches the inside: its
    # windows end one pixel behind their centers, which are even, as the sizes
    # of maps are.
    def mask_input(
      method: Callable[..., Any],
      args: tuple[Any, ...],
      kwargs: dict[str, Any],
      context: nn.module.InterceptorContext,
    ) -> Any:
      layer = context.module
      if isinstance(layer, nn.Conv) and np.max(layer.kernel_size) > 1:
        args = (area.zero_outside(args[0]), *args[1:])
      return method(*args, **kwargs)

    conv = functools.partial(layers.convolution, dtype=self.dtype)
    norm = functools.partial(
      layers.batch_norm,
      train=False,
      epsilon=self.norm_epsilon,
      dtype=self.dtype,
    )
    with nn.intercept_methods(mask_input):
      return resnet.feature_maps(images, self.depth, conv, norm)


class ConvEach(nn.Module):
  """A separate convolution for each map, named 0, 1, ..."""

  size: int
  features: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, maps: list[jax.Array]) -> list[jax.Array]:
    """Maps [B, H, W, C] each to [B, H, W, features] each."""
    return [
      convolution(self.size, self.features, dtype=self.dtype, name=str(i))(x)
      for i, x in enumerate(maps)
    ]


class FeaturePyramid(nn.Module):
  """Top-down pathway that adds coarse maps to fine ones (Figure 3)."""

  features: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, maps: list[jax.Array], area: ImageArea) -> list[jax.Array]:
    """Turns maps of strides 4 to 32 into maps of 4 to 64, `features` deep."""
    inner = ConvEach(1, self.features, self.dtype, name="inner_blocks")(maps)
    merged = [inner[-1]]
    for x in reversed(inner[:-1]):
      merged.insert(0, x + upsample(merged[0]))
    merged = [area.zero_outside(x) for x in merged]
    outer = ConvEach(3, self.features, self.dtype, name="layer_blocks")(merged)
    outer = [area.zero_outside(x) for x in outer]
    return [*outer, outer[-1][:, ::2, ::2]]


class Backbone(nn.Module):
  """ResNet and pyramid."""

  depth: int
  features: int
  norm_epsilon: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, images: jax.Array, area: ImageArea) -> list[jax.Array]:
    """Maps images [B, H, W, 3] to maps of strides 4, 8, 16, 32 and 64."""
    body = Body(self.depth, self.norm_epsilon, self.dtype, name="body")
    pyramid = FeaturePyramid(self.features, self.dtype, name="fpn")
    return pyramid(body(images, area), area)


def convolution(
  size: int, features: int, *, dtype: DTypeLike, name: str
) -> nn.Conv:
  """Builds a convolution with bias, as the heads and the pyramid have."""
  return nn.Conv(
    features,
    (size, size),
    padding=size // 2,
    dtype=dtype,
    param_dtype=layers.at_least_float32(dtype),
    name=name,
  )


def upsample(x: jax.Array) -> jax.Array:
  """Repeats every position twice along both sides."""
  return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def round_up(lengths: Any) -> Any:
  """Rounds lengths, an integer or an array, up to multiples of 32."""
  return (lengths + STRIDE - 1) // STRIDE * STRIDE

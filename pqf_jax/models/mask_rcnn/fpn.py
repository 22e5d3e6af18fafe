"""Feature pyramid (arXiv 1612.03144) over a ResNet, for images of any size.

Images lie in the top left of a common canvas. What is zero around an image is
what a convolution pads with, so the network sees each image as if it were
alone, if only everything outside of it is set to zero again before each layer
that looks there. Results then depend neither on the canvas nor on the other
images of a batch; torchvision's do, on both.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from pqf_jax.models import layers, resnet

STRIDE = 32
"""Of the coarsest map of the body; images are padded to its multiples."""


class Region:
  """Where the images of a batch are, in maps of any stride."""

  def __init__(self, sizes: jax.Array, canvas: tuple[int, int]):
    """Sizes int [B, 2] and the canvas, both multiples of 32."""
    self.sizes = sizes
    self.canvas = canvas

  def keep(self, x: jax.Array) -> jax.Array:
    """Maps [B, H, W, C] with zeros outside of the images."""
    length = jnp.asarray(x.shape[1:3], self.sizes.dtype)[None]
    # Exact: both are multiples of the stride.
    inside = self.sizes * length // jnp.asarray(self.canvas)[None]
    rows = jnp.arange(x.shape[1])[None, :] < inside[:, :1]
    columns = jnp.arange(x.shape[2])[None, :] < inside[:, 1:]
    mask = rows[:, :, None, None] & columns[:, None, :, None]
    return jnp.where(mask, x, 0)


class Body(resnet.ResNet):
  """The maps of a ResNet whose norms use their running statistics."""

  @nn.compact
  def __call__(self, images: jax.Array, region: Region) -> list[jax.Array]:
    """[B, H, W, 3] -> maps of strides 4, 8, 16 and 32."""

    # Only kernels larger than one pixel see what lies outside. So does max-pool
    # at the far borders, but nothing of it gets inside: its windows end one
    # pixel behind their centers, which are even, as the sizes of maps are.
    def zero_outside(
      method: Callable[..., Any],
      args: tuple[Any, ...],
      kwargs: dict[str, Any],
      context: nn.module.InterceptorContext,
    ) -> Any:
      layer = context.module
      if isinstance(layer, nn.Conv) and max(layer.kernel_size) > 1:
        args = (region.keep(args[0]), *args[1:])
      return method(*args, **kwargs)

    with nn.intercept_methods(zero_outside):
      return self.maps(images, train=False)


class ConvEach(nn.Module):
  """One convolution of its own for each map, named 0, 1, ..."""

  size: int
  features: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, maps: list[jax.Array]) -> list[jax.Array]:
    """[B, H, W, C] each -> [B, H, W, features] each."""
    return [
      convolution(self.size, self.features, dtype=self.dtype, name=str(i))(x)
      for i, x in enumerate(maps)
    ]


class FeaturePyramid(nn.Module):
  """Gives all maps the same channels, and fine ones what coarse ones know."""

  features: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, maps: list[jax.Array], region: Region) -> list[jax.Array]:
    """Maps of strides 4 to 32 -> maps of strides 4 to 64, `features` deep."""
    inner = ConvEach(1, self.features, self.dtype, name="inner_blocks")(maps)
    merged = [inner[-1]]
    for x in reversed(inner[:-1]):
      merged.insert(0, x + double(merged[0]))
    merged = [region.keep(x) for x in merged]
    outer = ConvEach(3, self.features, self.dtype, name="layer_blocks")(merged)
    outer = [region.keep(x) for x in outer]
    return [*outer, outer[-1][:, ::2, ::2]]


class Backbone(nn.Module):
  """ResNet and pyramid."""

  depth: int
  features: int
  norm_epsilon: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, images: jax.Array, region: Region) -> list[jax.Array]:
    """[B, H, W, 3] -> maps of strides 4, 8, 16, 32 and 64."""
    body = Body(
      self.depth,
      num_classes=0,
      dtype=self.dtype,
      norm_epsilon=self.norm_epsilon,
      name="body",
    )
    pyramid = FeaturePyramid(self.features, self.dtype, name="fpn")
    return pyramid(body(images, region), region)


def convolution(
  size: int, features: int, *, dtype: DTypeLike, name: str
) -> nn.Conv:
  """A convolution with bias of the heads and the pyramid."""
  return nn.Conv(
    features,
    (size, size),
    padding=size // 2,
    dtype=dtype,
    param_dtype=layers.at_least_float32(dtype),
    name=name,
  )


def double(x: jax.Array) -> jax.Array:
  """Every position twice along both sides."""
  return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def padded(sizes: Any) -> Any:
  """Lengths rounded up to multiples of 32; of arrays or integers."""
  return (sizes + STRIDE - 1) // STRIDE * STRIDE


def grid_sizes(sizes: jax.Array, num_maps: int) -> list[jax.Array]:
  """How much of each map of the pyramid belongs to the images.

  Args:
    sizes: int [B, 2], multiples of 32.
    num_maps: 5, or less for small pyramids.

  Returns:
    int [B, 2] for each of the strides 4, 8, ..., rounded up.
  """
  strides = [4 * 2**i for i in range(num_maps)]
  return [(sizes + stride - 1) // stride for stride in strides]

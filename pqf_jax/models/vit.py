"""Vision transformer (arXiv 2010.11929), which averages its patches."""

import jax
from flax import linen as nn

from pqf_jax import errors
from pqf_jax.models import layers, pre_norm


class Network(nn.Module):
  """The network; `make` describes the settings and checks them."""

  num_classes: int
  image_size: int
  patch: int
  features: int
  heads: int
  depth: int

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps images [B, side, side, channels] to logits [B, num_classes].

    Raises:
      InputError: the images have another side than `image_size`.
    """
    side = self.image_size
    if images.shape[1:3] != (side, side):
      raise errors.InputError(
        f"images of {' x '.join(map(str, images.shape[1:3]))} pixels, but the "
        f"ViT has image_size={side}; give --config.model.image_size and "
        "--config.data.image_size alike"
      )
    size = (self.patch, self.patch)
    x = nn.Conv(self.features, size, size, "VALID", name="patches")(images)
    x = x.reshape(len(x), -1, self.features)
    normal = nn.initializers.normal(0.02)
    x = x + self.param("positions", normal, (1, *x.shape[1:]))
    for i in range(self.depth):
      block = pre_norm.Block(self.heads, 4 * self.features, name=f"block{i}")
      x = block(x)
    x = nn.LayerNorm(name="norm")(x).mean(1)
    return nn.Dense(self.num_classes, name="head")(x)


def make(
  *,
  num_classes: int = 1000,
  image_size: int = 224,
  patch: int = 16,
  features: int = 768,
  heads: int = 12,
  depth: int = 12,
) -> Network:
  """Builds the network; by default of the size of ViT-B.

  Args:
    num_classes: number of logits.
    image_size: side of the images in pixels.
    patch: side of a patch in pixels, which divides that of an image.
    features: length of a patch's vector.
    heads: of the attention; they share the features.
    depth: number of blocks.

  Raises:
    InputError: a setting has an unsupported value.
  """
  layers.check_transformer(
    "ViT",
    num_classes=num_classes,
    image_size=image_size,
    patch=patch,
    features=features,
    heads=heads,
    depth=depth,
  )
  if image_size % patch:
    raise errors.InputError(
      f"ViT does not support image_size={image_size} with patch={patch}; "
      "choose a patch that divides the image"
    )
  return Network(num_classes, image_size, patch, features, heads, depth)

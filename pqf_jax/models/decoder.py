"""A decoder that predicts the next token, by default of bytes."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from pqf_jax import errors
from pqf_jax.models import layers, pre_norm


class Network(nn.Module):
  """The network; `make` describes the settings and checks them."""

  vocabulary: int
  positions: int
  features: int
  heads: int
  depth: int

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Maps tokens [B, T] to logits [B, T, vocabulary] of those that come next.

    Raises:
      InputError: there are more tokens than positions.
    """
    length = tokens.shape[1]
    if length > self.positions:
      raise errors.InputError(
        f"sequences of {length} tokens, but the network has {self.positions} "
        "positions; cut them"
      )
    embed = nn.Embed(self.vocabulary, self.features, name="tokens")
    places = nn.Embed(self.positions, self.features, name="places")
    x = embed(tokens) + places(jnp.arange(length))[None]
    for i in range(self.depth):
      hidden = 4 * self.features
      x = pre_norm.Block(self.heads, hidden, True, name=f"block{i}")(x)
    x = nn.LayerNorm(name="norm")(x)
    return nn.Dense(self.vocabulary, name="head")(x)


def make(
  *,
  vocabulary: int = 256,
  positions: int = 128,
  features: int = 128,
  heads: int = 4,
  depth: int = 4,
) -> Network:
  """Builds the network.

  Args:
    vocabulary: number of tokens.
    positions: tokens of the longest sequence.
    features: length of a token's vector.
    heads: of the attention; they share the features.
    depth: number of blocks.

  Raises:
    InputError: a setting has an unsupported value.
  """
  layers.check_transformer(
    "the decoder",
    vocabulary=vocabulary,
    positions=positions,
    features=features,
    heads=heads,
    depth=depth,
  )
  return Network(vocabulary, positions, features, heads, depth)

"""The transformer block of `vit` and `decoder`, whose norms come first."""

import jax
from flax import linen as nn


class Block(nn.Module):
  """Attention and two dense layers, each after a norm, added to the stream."""

  heads: int
  hidden: int
  causal: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, positions, features] to the same shape."""
    mask = nn.make_causal_mask(x[..., 0]) if self.causal else None
    attention = nn.MultiHeadDotProductAttention(self.heads, name="attention")
    x = x + attention(nn.LayerNorm(name="norm1")(x), mask=mask)
    h = nn.Dense(self.hidden, name="up")(nn.LayerNorm(name="norm2")(x))
    return x + nn.Dense(x.shape[-1], name="down")(nn.gelu(h))

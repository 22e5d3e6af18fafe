"""The transformer block of `vit` and `decoder`, whose norms come first."""

from typing import Any

import jax
from flax import linen as nn

from pqf_jax import errors


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


def check_settings(name: str, **settings: Any) -> None:
  """Refuses sizes of a network that are no counts, or do not fit its heads.

  Raises:
    InputError: names the setting.
  """
  for setting, size in settings.items():
    if not isinstance(size, int) or size < 1:
      raise errors.InputError(
        f"{name} does not support {setting}={size!r}; choose an integer >= 1"
      )
  features, heads = settings["features"], settings["heads"]
  if features % heads:
    raise errors.InputError(
      f"{name} does not support features={features} with heads={heads}; choose "
      "a number of heads that divides the features"
    )

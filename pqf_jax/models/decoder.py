"""A decoder that predicts the next token, by default of bytes."""

import functools

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
  scanned: bool

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
    make_block = functools.partial(
      pre_norm.Block, self.heads, 4 * self.features, True
    )
    if self.scanned:
      x = _run_scanned(make_block(name="blocks"), self.depth, x)
    else:
      for i in range(self.depth):
        x = make_block(name=f"block{i}")(x)
    x = nn.LayerNorm(name="norm")(x)
    return nn.Dense(self.vocabulary, name="head")(x)


def _run_scanned(block: nn.Module, depth: int, x: jax.Array) -> jax.Array:
  """Applies so many blocks, whose variables are stacked along a first axis.

  The backward pass computes each block again, so that neither its activations
  nor its decoded kernels are kept.
  """
  run = nn.scan(
    nn.remat(lambda one, x, _: (one(x), None), prevent_cse=False),
    variable_axes={"params": 0},
    split_rngs={"params": True},
    length=depth,
  )
  x, _ = run(block, x, None)
  return x


def make(
  *,
  vocabulary: int = 256,
  positions: int = 128,
  features: int = 128,
  heads: int = 4,
  depth: int = 4,
  scanned: bool = False,
) -> Network:
  """Builds the network.

  Args:
    vocabulary: number of tokens.
    positions: tokens of the longest sequence.
    features: length of a token's vector.
    heads: of the attention; they share the features.
    depth: number of blocks.
    scanned: whether the blocks are one stack that a loop runs: less to compile,
      and less memory in training, which computes each block twice.

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
  return Network(vocabulary, positions, features, heads, depth, scanned)

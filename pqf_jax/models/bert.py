"""Sentence embeddings by BERT (arXiv 1810.04805), such as MiniLM-L6.

Variables have the names of the Hugging Face `BertModel`:
`encoder.layer.0.attention.self.query.weight` is
`params/encoder/layer/0/attention/self/query/kernel`. As in Flax's own attention
the heads are an axis of their own: queries, keys and values have kernels
[features, heads, head], and the layer after them [heads, head, features].
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from pqf_jax import errors
from pqf_jax.core import trees
from pqf_jax.models import layers, torch_names

PyTree = Any
PADDING = 0  # the token [PAD]
# Of files: buffers, and a layer for another task that embeddings do not use.
_UNUSED = ("embeddings.position_ids", "pooler.")


class Network(nn.Module):
  """The network; `make` describes the settings and checks them."""

  vocabulary: int
  positions: int
  features: int
  heads: int
  hidden: int
  depth: int
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Maps tokens [B, T] to unit vectors [B, features], float32 or wider.

    A sentence ends where its padding begins; neither the attention nor the mean
    over the sentence sees that.

    Raises:
      InputError: there are more tokens than positions.
    """
    wide = layers.at_least_float32(self.dtype)
    mask = tokens != PADDING
    x = Embeddings(
      self.vocabulary,
      self.positions,
      self.features,
      self.dtype,
      name="embeddings",
    )(tokens)
    x = Encoder(
      self.heads, self.hidden, self.depth, self.dtype, name="encoder"
    )(x, mask)
    sums = jnp.einsum("btf,bt->bf", x.astype(wide), mask.astype(wide))
    mean = sums / jnp.maximum(mask.sum(1, keepdims=True, dtype=wide), 1e-9)
    length = jnp.linalg.norm(mean, axis=1, keepdims=True)
    return mean / jnp.maximum(length, 1e-12)


class Embeddings(nn.Module):
  """Vectors of the tokens, of their positions and of the first segment."""

  vocabulary: int
  positions: int
  features: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Maps tokens [B, T] to [B, T, features]."""
    length = tokens.shape[1]
    if length > self.positions:
      raise errors.InputError(
        f"sentences of {length} tokens, but the network has {self.positions} "
        "positions; cut them"
      )

    def table(rows: int, name: str) -> nn.Embed:
      wide = layers.at_least_float32(self.dtype)
      return nn.Embed(
        rows, self.features, dtype=self.dtype, param_dtype=wide, name=name
      )

    x = table(self.vocabulary, "word_embeddings")(tokens)
    places = jnp.arange(length)[None]
    x = x + table(self.positions, "position_embeddings")(places)
    x = x + table(2, "token_type_embeddings")(jnp.zeros_like(places))
    return _norm(self.dtype)(x)


class Encoder(nn.Module):
  """The transformer layers in sequence."""

  heads: int
  hidden: int
  depth: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    """Maps [B, T, features] to the same shape; the mask is [B, T]."""

    def layer(name: str) -> functools.partial[jax.Array]:
      block = Block(self.heads, self.hidden, self.dtype, name=name)
      return functools.partial(block, mask=mask)

    return layers.Chain((layer,) * self.depth, name="layer")(x)


class Block(nn.Module):
  """Attention, and two dense layers with GELU; a norm follows each sum."""

  heads: int
  hidden: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    """Maps [B, T, features] to the same shape; the mask is [B, T]."""
    x = Attention(self.heads, self.dtype, name="attention")(x, mask)
    y = Intermediate(self.hidden, self.dtype, name="intermediate")(x)
    return Output((-1,), self.dtype, name="output")(y, x)


class Attention(nn.Module):
  """Attention of each token to all of its sentence, with the sum and norm."""

  heads: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    """Maps [B, T, features] to the same shape; the mask is [B, T]."""
    y = Heads(self.heads, self.dtype, name="self")(x, mask)
    return Output((-2, -1), self.dtype, name="output")(y, x)


class Heads(nn.Module):
  """The heads of the attention."""

  heads: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    """Maps [B, T, features] to [B, T, heads, head]; the mask is [B, T]."""
    shape = (self.heads, x.shape[-1] // self.heads)
    query, key, value = (
      _dense(shape, self.dtype, name)(x) for name in ("query", "key", "value")
    )
    mask = mask[:, None, None]
    return nn.dot_product_attention(query, key, value, mask=mask)


class Intermediate(nn.Module):
  """The dense layer that widens."""

  hidden: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, T, features] to [B, T, hidden]."""
    x = _dense((self.hidden,), self.dtype, "dense")(x)
    return nn.gelu(x, approximate=False)


class Output(nn.Module):
  """A dense layer back to the features, the sum with x, and the norm."""

  axes: tuple[int, ...]
  dtype: DTypeLike

  @nn.compact
  def __call__(self, y: jax.Array, x: jax.Array) -> jax.Array:
    """Maps y, along its last axes, and x to the shape of x."""
    y = _dense(x.shape[-1:], self.dtype, "dense", self.axes)(y)
    return _norm(self.dtype)(x + y)


def _dense(
  shape: tuple[int, ...],
  dtype: DTypeLike,
  name: str,
  axes: tuple[int, ...] = (-1,),
) -> nn.DenseGeneral:
  wide = layers.at_least_float32(dtype)
  return nn.DenseGeneral(
    shape, axis=axes, dtype=dtype, param_dtype=wide, name=name
  )


def _norm(dtype: DTypeLike) -> nn.LayerNorm:
  return nn.LayerNorm(
    1e-12,
    dtype=dtype,
    param_dtype=layers.at_least_float32(dtype),
    use_fast_variance=False,
    name="LayerNorm",
  )


def make(
  *,
  vocabulary: int = 30522,
  positions: int = 512,
  features: int = 384,
  heads: int = 12,
  hidden: int = 1536,
  depth: int = 6,
  dtype: DTypeLike = jnp.float32,
) -> Network:
  """Builds the network; by default MiniLM-L6.

  Args:
    vocabulary: number of tokens.
    positions: tokens of the longest sentence.
    features: length of a token's vector.
    heads: of the attention; they share the features.
    hidden: features between the two dense layers of a block.
    depth: number of blocks.
    dtype: floating type of the computation.

  Raises:
    InputError: a setting has an unsupported value.
  """
  layers.check_choice("BERT", "dtype", dtype, layers.DTYPES)
  layers.check_transformer(
    "BERT",
    vocabulary=vocabulary,
    positions=positions,
    features=features,
    heads=heads,
    hidden=hidden,
    depth=depth,
  )
  return Network(vocabulary, positions, features, heads, hidden, depth, dtype)


def load_torch(state_dict: Mapping[str, Any], template: PyTree) -> PyTree:
  """Maps the state dict of a `BertModel` to variables; see `torch_names`.

  The pooler is left out: embeddings are means over the tokens.
  """
  used = {
    name: array
    for name, array in state_dict.items()
    if not name.startswith(_UNUSED)
  }
  flat = {
    path: jax.ShapeDtypeStruct(_joined(path, leaf.shape), leaf.dtype)
    for path, leaf in trees.flatten(template).items()
  }
  variables = torch_names.torch_to_flax(used, trees.replace(template, flat))
  return jax.tree.map(
    lambda array, leaf: array.reshape(leaf.shape), variables, template
  )


def _joined(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Returns a shape with the heads and their channels as one axis."""
  if "/attention/self/" in path:  # [..., heads, head]
    return (*shape[:-2], shape[-2] * shape[-1])
  if len(shape) == 3:  # [heads, head, features]
    return (shape[0] * shape[1], shape[2])
  return shape

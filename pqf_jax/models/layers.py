"""What the networks share: convolutions, norms, and how settings are checked.

Parameters, statistics of norms and logits are float32 at least, whatever the
type of the computation in between.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from pqf_jax import errors

Layer = Callable[..., Callable[[jax.Array], jax.Array]]
"""Takes a `name` and gives a layer."""
DTYPES = tuple(map(np.dtype, (jnp.bfloat16, "float16", "float32", "float64")))


class Chain(nn.Module):
  """Layers one after the other, named '0', '1', ... as torch's Sequential."""

  layers: Sequence[Layer]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """What the last layer gives for x."""
    for i, layer in enumerate(self.layers):
      x = layer(name=str(i))(x)
    return x


def stateless(function: Callable[[jax.Array], jax.Array]) -> Layer:
  """A function as a layer of a `Chain`: it has a number but no variables."""
  return lambda name: function


def convolution(
  size: int,
  features: int,
  stride: int,
  *,
  groups: int = 1,
  padding: str | None = None,
  dtype: DTypeLike,
  name: str,
) -> nn.Conv:
  """A convolution without bias.

  Args:
    size: side of the kernel in pixels.
    features: output channels.
    stride: pixels of the input to one of the output.
    groups: as many as there are channels makes it depthwise.
    padding: None: the same amount on every side, as torch; 'SAME', as
      TensorFlow, pads strided ones by less on the left and at the top.
    dtype: of the computation.
    name: of the module.
  """
  return nn.Conv(
    features,
    (size, size),
    strides=stride,
    padding=size // 2 if padding is None else padding,
    feature_group_count=groups,
    use_bias=False,
    dtype=dtype,
    param_dtype=at_least_float32(dtype),
    kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
    name=name,
  )


def batch_norm(
  *,
  train: bool,
  epsilon: float,
  dtype: DTypeLike,
  axis: str | None = None,
  name: str,
) -> nn.BatchNorm:
  """A norm with the statistics of the batch in training, else the running ones.

  The batch is that of all devices along `axis`, the name of a `shard_map`'s, or
  where that is None what the norm itself is given.

  In training, `mutable=["batch_stats"]` also returns the new running ones, 0.9
  old + 0.1 batch. That is torch's momentum of 0.1, but of the variance torch
  averages the unbiased one, n / (n - 1) times that of Flax, where n = B * H * W
  of the norm's map. What a batch is divided by is the same.
  """
  return nn.BatchNorm(
    use_running_average=not train,
    momentum=0.9,
    epsilon=epsilon,
    dtype=dtype,
    param_dtype=at_least_float32(dtype),
    axis_name=axis,
    name=name,
  )


def linear(num_classes: int, *, dtype: DTypeLike, name: str) -> nn.Dense:
  """The classifier: its logits are of float32 or wider."""
  wide = at_least_float32(dtype)
  return nn.Dense(num_classes, dtype=wide, param_dtype=wide, name=name)


def at_least_float32(dtype: DTypeLike) -> np.dtype:
  """The type of parameters and logits where the rest is of type `dtype`."""
  return np.promote_types(dtype, np.float32)


def check_choice(
  network: str, name: str, value: Any, choices: tuple[Any, ...]
) -> None:
  """Refuses a setting that is none of the choices.

  Raises:
    InputError: names the setting, its value and the choices.
  """
  if value not in choices:
    raise errors.InputError(
      f"{network} has no {name}={value!r}; choose from {choices}"
    )


def check_settings(network: str, num_classes: int, dtype: DTypeLike) -> None:
  """Refuses what no network can have.

  Raises:
    InputError: no floating type, or no number of classes.
  """
  check_choice(network, "dtype", dtype, DTYPES)
  if not isinstance(num_classes, int) or num_classes < 1:
    raise errors.InputError(
      f"{network} has no num_classes={num_classes!r}; choose an integer >= 1"
    )

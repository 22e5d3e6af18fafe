"""Convolutions, norms and checks of settings that the networks share.

Parameters, statistics of norms and logits are float32 or wider, whatever the
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
"""A function of a `name` that returns a layer."""
DTYPES = tuple(map(np.dtype, (jnp.bfloat16, "float16", "float32", "float64")))


class Chain(nn.Module):
  """Layers in sequence, named '0', '1', ... as in torch's Sequential."""

  layers: Sequence[Layer]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Applies the layers in order."""
    for i, layer in enumerate(self.layers):
      x = layer(name=str(i))(x)
    return x


def stateless(function: Callable[[jax.Array], jax.Array]) -> Layer:
  """Wraps a function as a layer of a `Chain` that has no variables."""
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
  """Builds a convolution without bias.

  Args:
    size: side of the kernel in pixels.
    features: output channels.
    stride: input pixels between two neighbouring outputs.
    groups: as many as there are channels makes it depthwise.
    padding: None pads all sides alike, as torch; 'SAME' is TensorFlow's, which
      pads strided convolutions less at the left and the top.
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
  """Builds a norm that uses batch statistics in training, else running ones.

  The batch is that of all devices along `axis`, the name of a `shard_map` axis;
  without an axis it is the norm's own input.

  In training, `mutable=["batch_stats"]` also returns the new running
  statistics, 0.9 * old + 0.1 * batch. This is torch's momentum of 0.1, except
  that torch averages the unbiased variance, which is n / (n - 1) times that of
  Flax, with n = B * H * W of the norm's map. Both divide a batch by the same
  number.
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


def dense(features: int, *, dtype: DTypeLike, name: str) -> nn.Dense:
  """Builds a dense layer."""
  wide = at_least_float32(dtype)
  return nn.Dense(features, dtype=dtype, param_dtype=wide, name=name)


def at_least_float32(dtype: DTypeLike) -> np.dtype:
  """Returns the type of parameters and logits for a computation in `dtype`."""
  return np.promote_types(dtype, np.float32)


def check_choice(
  network: str, name: str, value: Any, choices: tuple[Any, ...]
) -> None:
  """Refuses a setting that is not among the choices.

  Raises:
    InputError: names the setting, its value and the choices.
  """
  if value not in choices:
    raise errors.InputError(
      f"{network} does not support {name}={value!r}; choose from "
      f"{', '.join(map(str, choices))}"
    )


def check_range(
  network: str, name: str, values: Sequence[float], least: float, most: float
) -> None:
  """Refuses a setting of one or more numbers that one of them makes useless.

  Raises:
    InputError: there is no number, or one is out of range or not a number.
  """
  if not values or not all(
    isinstance(value, (int, float)) and least <= value <= most
    for value in values
  ):
    shown = values[0] if len(values) == 1 else tuple(values)
    raise errors.InputError(
      f"{network} does not support {name}={shown!r}; choose {least:g} to "
      f"{most:g}"
    )


def check_settings(network: str, num_classes: int, dtype: DTypeLike) -> None:
  """Refuses values that no network supports.

  Raises:
    InputError: `dtype` is not a floating type, or `num_classes` is not a
      positive integer.
  """
  check_choice(network, "dtype", dtype, DTYPES)
  if not isinstance(num_classes, int) or num_classes < 1:
    raise errors.InputError(
      f"{network} does not support num_classes={num_classes!r}; choose an "
      "integer >= 1"
    )


def check_transformer(network: str, **settings: Any) -> None:
  """Refuses sizes of a transformer that are no counts, or unfit for its heads.

  Raises:
    InputError: names the setting.
  """
  for setting, size in settings.items():
    if not isinstance(size, int) or size < 1:
      raise errors.InputError(
        f"{network} does not support {setting}={size!r}; choose an integer >= 1"
      )
  features, heads = settings["features"], settings["heads"]
  if features % heads:
    raise errors.InputError(
      f"{network} does not support features={features} with heads={heads}; "
      "choose a number of heads that divides the features"
    )

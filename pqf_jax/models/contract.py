"""What a model and the network that it makes must have, and may have.

A model is a module of this package, or any object of the same shape that
`pqf_jax.models.register` was given. `Model` and `Network` list the members that
the pipeline really uses. What is optional is found out here, before any work:
`check_trainable` refuses a config that asks for what a network lacks.
"""

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from pqf_jax import errors
from pqf_jax.core import plan as plans
from pqf_jax.core import trees

PyTree = Any


class Model(Protocol):
  """An architecture: it makes networks, and may read torch's weights.

  Optional members:
    load_torch(state_dict, template) -> variables: maps weights with torch's
      names. Without it only files of this library can be read.
    arrange(state_dict) -> state_dict: brings torch's layout into the common one
      where they differ in more than names, or in the names of the layer that
      depends on `num_classes`.
    backbone(**settings) -> (network, prefix): the classifier that stage 0 can
      begin with, and where its variables belong; see `config.backbone`. Without
      it stage 0 can begin with the same network for other classes.
  """

  def make(self, **settings: Any) -> "Network":
    """Builds a network from `config.model` without its name.

    Raises:
      InputError: a setting has an unknown value.
    """


class Network(Protocol):
  """A Flax Linen module, as the stages use it.

  Optional members:
    dtype: field, the type of the computation. Needed for another
      `config.dtype` than 'float32'.
    norm_axis: field, the `shard_map` axis over which batch norms average.
      Needed where several devices share a batch and
      `config.norm_statistics` is 'batch'.
    norm_epsilon: field, the epsilon of all batch norms. Needed to fold them,
      so by every network that has some.
    train: argument of `__call__`, False by default: norms use the statistics
      of the batch, dropout is on.
  """

  def init(self, *args: Any, **kwargs: Any) -> Any:
    """Maps (key, *inputs) to variables, a dict of collections."""

  def apply(self, *args: Any, **kwargs: Any) -> Any:
    """Maps (variables, *inputs) to outputs."""

  def clone(self, *args: Any, **kwargs: Any) -> Any:
    """Returns the network with other values of the named fields."""


def check_norms(name: str, network: Network, template: PyTree) -> None:
  """Refuses a network whose batch norms cannot be folded.

  Args:
    name: of the model.
    network: what the model made.
    template: its variables as shapes.

  Raises:
    InputError: it has batch norms but does not state their epsilon.
  """
  norms = plans.foldable_norms(trees.flatten(template))
  if norms and norm_epsilon(network) is None:
    raise errors.InputError(
      f"model {name!r} has batch norms, {next(iter(norms))} for one, but no "
      "field norm_epsilon; add the field, so that the norms can be folded"
    )


def check_statistics(network: Network, variables: PyTree, setting: str) -> None:
  """Refuses to train a network whose norms have lost their statistics.

  Where mean and variance are folded into scale and bias, the norm evaluates as
  before, but with the statistics of a batch it is another function.

  Args:
    network: that would be trained from the variables.
    variables: arrays, a tree or {path: array}.
    setting: the one that names their file.

  Raises:
    InputError: a norm is folded, and the network trains with batch statistics.
  """
  epsilon = norm_epsilon(network)
  if epsilon is None or not _knows_train(network):
    return
  flat = trees.flatten(variables)
  folded = [
    norm
    for norm, (*_, mean, var) in plans.foldable_norms(flat).items()
    if not np.any(flat[mean])
    and np.all(np.asarray(flat[var]) == np.float32(1 - epsilon))
  ]
  if folded:
    raise errors.InputError(
      f"{setting} has {len(folded)} batch norms, {folded[0]} for one, whose "
      "mean and variance are folded into scale and bias, as compressed files "
      "store them: training would start from another function; give the "
      "weights from before the compression, or set config.finetune.epochs=0"
    )


def norm_epsilon(network: Network) -> float | None:
  """Returns the epsilon of the network's norms, or None if it states none."""
  return getattr(network, "norm_epsilon", None)


def check_trainable(
  name: str,
  network: Network,
  template: PyTree,
  *,
  dtype: str,
  norm_axis: str | None,
) -> None:
  """Refuses a config that asks for more than the network can do.

  Args:
    name: of the model.
    network: what the model made.
    template: its variables as shapes.
    dtype: `config.dtype`.
    norm_axis: the axis over which norms must average; None: each device may
      use its own statistics.

  Raises:
    InputError: names the field that the network lacks, and the setting.
  """
  if dtype != "float32" and not hasattr(network, "dtype"):
    raise errors.InputError(
      f"config.dtype is {dtype!r}, but model {name!r} has no field dtype; add "
      "the field or use config.dtype=float32"
    )
  has_statistics = bool(template.get("batch_stats"))
  if norm_axis and has_statistics and not hasattr(network, "norm_axis"):
    raise errors.InputError(
      f"config.norm_statistics is 'batch' on several devices, but model "
      f"{name!r} has no field norm_axis to average over them; add the field or "
      "use config.norm_statistics=device"
    )


def for_training(
  network: Network, *, dtype: str, norm_axis: str | None = None
) -> Network:
  """Returns the network with those of the two fields that it has."""
  wanted = {"dtype": jnp.dtype(dtype), "norm_axis": norm_axis}
  return network.clone(
    **{name: value for name, value in wanted.items() if hasattr(network, name)}
  )


def apply_function(network: Network) -> Callable[..., Any]:
  """Returns `network.apply`, which takes `train` whether it is known or not."""
  if _knows_train(network):
    return network.apply

  def apply(*inputs: Any, train: bool = False, **settings: Any) -> Any:
    del train
    return network.apply(*inputs, **settings)

  return apply


def _knows_train(network: Network) -> bool:
  return "train" in inspect.signature(type(network).__call__).parameters

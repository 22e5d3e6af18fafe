"""Networks, one module an architecture, found by the name of the module.

A module here is a model (`contract.Model`) unless `_PARTS` names it. Models
from outside of this package join by `register` or by an entry point of the
group `pqf_jax.models`.
"""

import pkgutil
from typing import Any

from pqf_jax import errors, registry
from pqf_jax.models.contract import Model as Model

_PARTS = ("authors_files", "contract", "layers", "pre_norm", "torch_names")
_REGISTRY = registry.Registry(
  "model",
  {
    entry.name: f"{__name__}.{entry.name}"
    for entry in pkgutil.iter_modules(__path__)
    if entry.name not in _PARTS
  },
  entry_points="pqf_jax.models",
)


def register(name: str, model: Model | str) -> None:
  """Adds a model, or the 'package.module' to import it from.

  Raises:
    InputError: another model has the name.
  """
  _REGISTRY.register(name, model)


def get_model(name: str) -> Any:
  """Returns the model that `config.model.name` names.

  Args:
    name: as listed by `list_models`, such as 'resnet'.

  Returns:
    A `contract.Model`, which may have optional members.

  Raises:
    InputError: there is no such model, or it cannot make a network.
  """
  model = _REGISTRY.get(name)
  if not hasattr(model, "make"):
    raise errors.InputError(
      f"model {name!r} has no function make(**settings); see "
      "pqf_jax.models.contract"
    )
  return model


def list_models() -> list[str]:
  """Returns the names of all models in alphabetical order."""
  return _REGISTRY.names()

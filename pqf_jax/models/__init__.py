"""Networks, one file an architecture, found by the name of the file.

A model is a module with two functions:

    make(**settings) -> flax.linen.Module
    load_torch(state_dict, template) -> variables
"""

import difflib
import importlib
import pkgutil
import types

from pqf_jax import errors


def list_models() -> list[str]:
  """Names of the modules of this package that are models, in order."""
  names = sorted(entry.name for entry in pkgutil.iter_modules(__path__))
  return [name for name in names if _is_model(_import(name))]


def get_model(name: str) -> types.ModuleType:
  """The module `pqf_jax.models.<name>`.

  Args:
    name: as listed by `list_models`, such as 'resnet'.

  Returns:
    The module, whose `make` builds the network and whose `load_torch` maps
    weights with torch's names to its variables. Where torch's layout differs
    in more than names, `arrange` brings a state dict into the common one.

  Raises:
    InputError: there is no such model; the message lists those that exist.
  """
  if name not in (known := list_models()):
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise errors.InputError(
      f"no model is named {name!r}: {hint}there are {', '.join(known)}"
    )
  return _import(name)


def _import(name: str) -> types.ModuleType:
  return importlib.import_module(f"{__name__}.{name}")


def _is_model(module: types.ModuleType) -> bool:
  return hasattr(module, "make") and hasattr(module, "load_torch")

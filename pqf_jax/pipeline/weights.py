"""Reads a weights file, whichever of the known kinds it is."""

from typing import Any

from pqf_jax import errors, models, pack
from pqf_jax.core import trees, vq_array
from pqf_jax.models import torch_weights

PyTree = Any


def read(path: str, model_name: str, template: PyTree) -> PyTree:
  """The variables in a file, checked against the model.

  Args:
    path: `.safetensors`, packed by this library (compressed or dense) or with
      torch's names.
    model_name: of the module under `pqf_jax.models` that knows torch's names.
    template: the model's variables as `jax.ShapeDtypeStruct`s.

  Raises:
    InputError: no such file, damaged, or of another architecture: missing and
      extra names are listed.
  """
  if pack.read_header(path) is None:
    state_dict = torch_weights.read_safetensors(path)
    return models.get_model(model_name).load_torch(state_dict, template)
  variables = pack.load(path)
  _check_same(path, variables, template)
  return variables


def _check_same(path: str, variables: PyTree, template: PyTree) -> None:
  found = trees.flatten(variables, vq_array.is_vq)
  wanted = trees.flatten(template)
  missing = sorted(wanted.keys() - found.keys())
  extra = sorted(found.keys() - wanted.keys())
  shapes = [
    f"{name} is {found[name].shape}, not {wanted[name].shape}"
    for name in sorted(wanted.keys() & found.keys())
    if found[name].shape != wanted[name].shape
  ]
  if missing or extra or shapes:
    raise errors.InputError(
      f"{path} holds another architecture than the config asks for: missing "
      f"{missing}, extra {extra}, shapes {shapes}"
    )

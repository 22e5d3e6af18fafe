"""Writes weights for other programs."""

from typing import Any

import jax
import numpy as np
from safetensors import numpy as safetensors_numpy

from pqf_jax import errors, models
from pqf_jax.core import trees, vq_array
from pqf_jax.models import torch_names

PyTree = Any


def to_torch(variables: PyTree, model_name: str) -> bytes:
  """Returns a `.safetensors` file of dense weights with torch's names.

  Args:
    variables: of the model, compressed or dense.
    model_name: of the module under `pqf_jax.models` that knows torch's names.

  Raises:
    InputError: the model would not read the same variables from the file,
      because its names or layouts are others than `models.torch_names` knows.
  """
  dense = jax.tree.map(np.asarray, vq_array.decode_params(variables))
  model = models.get_model(model_name)
  refusal = errors.InputError(
    f"model {model_name!r} has weights whose torch names or layouts are not "
    "known for writing; use the packed file, or pqf_jax.export"
  )
  if not hasattr(model, "load_torch"):
    raise refusal
  try:
    state_dict = torch_names.flax_to_torch(dense)
    again = model.load_torch(state_dict, trees.shapes(dense))
  except errors.InputError as error:
    raise refusal from error
  for left, right in zip(
    jax.tree.leaves(again), jax.tree.leaves(dense), strict=True
  ):
    if np.asarray(left).tobytes() != right.tobytes():
      raise refusal
  return safetensors_numpy.save(state_dict, {"format": "pt"})

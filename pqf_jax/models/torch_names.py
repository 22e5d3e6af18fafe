"""Torch state dicts <-> Flax variables of modules with the same names.

    params/layer1/0/conv1/kernel [h, w, in, out]   layer1.0.conv1.weight
                                                   [out, in, h, w]
    params/fc/kernel [in, out]                     fc.weight [out, in]
    params/bn1/scale, bias [n]                     bn1.weight, bias
    batch_stats/bn1/mean, var [n]                  bn1.running_mean, running_var

The same rule holds for grouped and depthwise convolutions, where `in` counts
the channels of one group, and for convolutions over one or three dimensions.
It does not hold for `nn.ConvTranspose`, whose weight torch has as
[in, out, h, w] and applies without the flip of Flax: a model with such layers
maps those itself.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from pqf_jax import errors
from pqf_jax.core import trees

PyTree = Any
StateDict = dict[str, np.ndarray]
TORCH_NAMES = {
  "kernel": "weight",
  "embedding": "weight",
  "scale": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
}
NUM_LISTED = 5


def torch_to_flax(state_dict: Mapping[str, Any], template: PyTree) -> PyTree:
  """Maps a state dict to the variables of a Flax module with the same names.

  Torch's counters `num_batches_tracked` are dropped; all else must be used.

  Args:
    state_dict: {name: array}, such as `read_safetensors` gives; CPU tensors of
      a type that NumPy has will do as well.
    template: the variables as arrays or `jax.ShapeDtypeStruct`s, such as
      `jax.eval_shape(model.init, key, images)` gives.

  Returns:
    Variables of the template's structure, shapes, and types, as copies.

  Raises:
    InputError: names are missing or left over, shapes differ, or weights are
      NaN or infinite; one message lists them all, in torch's terms.
  """
  found = {
    name: np.asarray(value)
    for name, value in state_dict.items()
    if name.rpartition(".")[2] != "num_batches_tracked"
  }
  leaves = trees.flatten(template)
  names = {path: torch_name(path) for path in leaves}
  shapes = {
    names[path]: torch_shape(path, leaf) for path, leaf in leaves.items()
  }
  check_fit(found, shapes)
  # jnp.array copies, where jnp.asarray may keep the caller's memory.
  variables = {
    path: jnp.array(
      found[names[path]].transpose(np.argsort(_torch_axes(path, leaf))),
      leaf.dtype,
    )
    for path, leaf in leaves.items()
  }
  return trees.replace(template, variables)


def flax_to_torch(variables: PyTree) -> StateDict:
  """The state dict of which `torch_to_flax` makes these variables.

  Torch's strict `load_state_dict` accepts it: missing `num_batches_tracked`
  are set to 0.

  Args:
    variables: dense arrays; decode compressed kernels first.

  Returns:
    {name: contiguous array}.

  Raises:
    InputError: a variable has no counterpart in torch.
  """
  return {
    # Contiguous, because safetensors writes the bytes of others in disorder.
    torch_name(path): np.array(
      np.asarray(leaf).transpose(_torch_axes(path, leaf)), order="C"
    )
    for path, leaf in trees.flatten(variables).items()
  }


def read_safetensors(path: str | os.PathLike[str]) -> StateDict:
  """Reads {name: array} from a `.safetensors` file.

  Raises:
    InputError: there is no such file, it is damaged or of another format, or
      holds a type that NumPy lacks.
  """
  path = pathlib.Path(path).absolute()
  if not path.is_file():
    raise errors.InputError(
      f"no weights file {path}; give the path of a .safetensors file"
    )
  try:
    return safetensors_numpy.load_file(path)
  except safetensors.SafetensorError as error:
    raise errors.InputError(
      f"{path} is incomplete or no safetensors file ({error}); copy it "
      "again or, if torch.save wrote it, rename it to .pth"
    ) from error
  except AttributeError as error:
    # How safetensors says it of types such as float8.
    raise errors.InputError(
      f"{path} holds weights of a type that NumPy lacks ({error}); store "
      "them as float16 or float32"
    ) from error


def check_fit(
  found: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
  """Refuses weights of another architecture than the model's, and NaN.

  Args:
    found: {name: array, or node of arrays with a shape}.
    shapes: {name: shape} of the model, by the same names.

  Raises:
    InputError: names are missing or left over, shapes differ, or weights are
      NaN or infinite; one message lists them all.
  """
  both = sorted(shapes.keys() & found.keys())
  problems = {
    "missing": sorted(shapes.keys() - found.keys()),
    "extra": sorted(found.keys() - shapes.keys()),
    "of another shape": [
      f"{name} is {tuple(found[name].shape)}, the model has {shapes[name]}"
      for name in both
      if tuple(found[name].shape) != shapes[name]
    ],
    "NaN or infinite": [
      name
      for name in both
      if not all(np.isfinite(x).all() for x in jax.tree.leaves(found[name]))
    ],
  }
  listed = [
    f"{len(names)} {problem} ({shorten(names)})"
    for problem, names in problems.items()
    if names
  ]
  if listed:
    raise errors.InputError(
      f"the weights do not fit the model: {'; '.join(listed)}. Choose other "
      "weights, or the settings of the model that they were trained with"
    )


def shorten(names: Sequence[str]) -> str:
  """The first few names, and how many more there are."""
  rest = len(names) - NUM_LISTED
  more = f", and {rest} more" if rest > 0 else ""
  return ", ".join(names[:NUM_LISTED]) + more


def torch_name(path: str) -> str:
  """'params/layer1/0/conv1/kernel' -> 'layer1.0.conv1.weight'.

  Raises:
    InputError: torch has no such variable.
  """
  *parents, name = path.split("/")
  modules = parents[1:]
  if not modules or name not in TORCH_NAMES:
    raise errors.InputError(
      f"{path} has no counterpart in torch: variables are "
      f"<collection>/<modules>/<name> with a name among {list(TORCH_NAMES)}; "
      "decode compressed kernels first"
    )
  return ".".join([*modules, TORCH_NAMES[name]])


def torch_shape(path: str, leaf: Any) -> tuple[int, ...]:
  """The shape that torch has for a variable of Flax.

  Args:
    path: of the variable.
    leaf: an array or a `jax.ShapeDtypeStruct`.

  Raises:
    InputError: a kernel of a rank that torch lacks.
  """
  return tuple(leaf.shape[axis] for axis in _torch_axes(path, leaf))


def _torch_axes(path: str, leaf: Any) -> tuple[int, ...]:
  """The axes of a Flax array in the order in which torch has them."""
  rank = len(leaf.shape)
  if path.rpartition("/")[2] != "kernel":
    return tuple(range(rank))
  if not 2 <= rank <= 5:
    raise errors.InputError(
      f"{path} of shape {tuple(leaf.shape)} has rank {rank}; kernels of "
      "torch have rank 2 (linear) to 5 (convolution in three dimensions)"
    )
  return (rank - 1, rank - 2, *range(rank - 2))

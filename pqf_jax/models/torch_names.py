"""Conversion between torch state dicts and Flax variables of the same names.

    params/layer1/0/conv1/kernel [h, w, in, out]   layer1.0.conv1.weight
                                                   [out, in, h, w]
    params/fc/kernel [in, out]                     fc.weight [out, in]
    params/bn1/scale, bias [n]                     bn1.weight, bias
    batch_stats/bn1/mean, var [n]                  bn1.running_mean, running_var

The same rule holds for grouped and depthwise convolutions, where `in` counts
the channels of one group, and for convolutions over one or three dimensions.
It does not hold for `nn.ConvTranspose`: torch stores its weight as
[in, out, h, w] and applies it without the flip of Flax. A model that has such
layers maps them itself.
"""

import os
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence
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
# Last parts of the names of a norm's variance, in torch and in Flax.
VARIANCES = ("running_var", "var")
NUM_LISTED = 5


def torch_to_flax(state_dict: Mapping[str, Any], template: PyTree) -> PyTree:
  """Maps a state dict to the variables of a Flax module with the same names.

  Torch's counters `num_batches_tracked` are dropped; every other entry must
  be used.

  Args:
    state_dict: {name: array}, such as `read_safetensors` returns; the values
      may also be CPU tensors of a type that NumPy has.
    template: the variables as arrays or `jax.ShapeDtypeStruct`s, such as
      `jax.eval_shape(model.init, key, images)` returns.

  Returns:
    Variables with the template's structure, shapes and types, as copies.

  Raises:
    InputError: see `check_fit`; the message has torch's names.
  """
  arrays = {
    name: np.asarray(value)
    for name, value in state_dict.items()
    if name.rpartition(".")[2] != "num_batches_tracked"
  }
  leaves = trees.flatten(template)
  names = {path: torch_name(path) for path in leaves}
  shapes = {
    names[path]: torch_shape(path, leaf) for path, leaf in leaves.items()
  }
  integers = {
    names[path]
    for path, leaf in leaves.items()
    if not jnp.issubdtype(leaf.dtype, jnp.floating)
  }
  check_fit(arrays, shapes, integers)
  # jnp.array copies, where jnp.asarray may keep the caller's memory.
  variables = {
    path: jnp.array(
      arrays[names[path]].transpose(np.argsort(_torch_axes(path, leaf))),
      leaf.dtype,
    )
    for path, leaf in leaves.items()
  }
  return trees.replace(template, variables)


def flax_to_torch(variables: PyTree) -> StateDict:
  """Maps variables to a torch state dict; undoes `torch_to_flax`.

  Torch's strict `load_state_dict` accepts the result: it sets the missing
  `num_batches_tracked` to 0.

  Args:
    variables: dense arrays; decode compressed kernels first.

  Returns:
    {name: contiguous array}.

  Raises:
    InputError: a variable has no counterpart in torch.
  """
  return {
    # Contiguous, because safetensors writes other arrays in the wrong order.
    torch_name(path): np.array(
      np.asarray(leaf).transpose(_torch_axes(path, leaf)), order="C"
    )
    for path, leaf in trees.flatten(variables).items()
  }


def rename_modules(
  state_dict: Mapping[str, Any], names: Mapping[str, str]
) -> StateDict:
  """Returns a state dict with other names of some modules.

  Args:
    state_dict: {module.entry: array}.
    names: {module: its other name}.
  """

  def renamed(name: str) -> str:
    module, _, entry = name.rpartition(".")
    return f"{names.get(module, module)}.{entry}"

  return {renamed(name): array for name, array in state_dict.items()}


def read_safetensors(path: str | os.PathLike[str]) -> StateDict:
  """Reads {name: array} from a `.safetensors` file.

  Raises:
    InputError: the file does not exist, is damaged, has another format, or
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
      f"{path} is incomplete or not a safetensors file ({error}); copy it "
      "again or, if torch.save wrote it, rename it to .pth"
    ) from error
  except AttributeError as error:
    # Safetensors raises this for types such as float8.
    raise errors.InputError(
      f"{path} holds weights of a type that NumPy lacks ({error}); store "
      "them as float16 or float32"
    ) from error


def check_fit(
  weights: Mapping[str, Any],
  shapes: Mapping[str, tuple[int, ...]],
  integers: Collection[str] = (),
) -> None:
  """Refuses weights of another architecture, and values that cannot be right.

  Args:
    weights: {name: array or `VQArray`}.
    shapes: {name: shape} that the model expects.
    integers: names that need not be floats.

  Raises:
    InputError: names are missing or extra, shapes differ, or weights are not
      floats (integers would need scales), not finite in float32, or negative
      where they are a variance; one message lists them all.
  """
  both = sorted(shapes.keys() & weights.keys())
  floats = {
    name: [np.asarray(leaf) for leaf in jax.tree.leaves(weights[name])]
    for name in both
    if jnp.issubdtype(weights[name].dtype, jnp.floating)
  }
  problems = {
    "missing": sorted(shapes.keys() - weights.keys()),
    "extra": sorted(weights.keys() - shapes.keys()),
    "of another shape": [
      f"{name} is {tuple(weights[name].shape)}, the model has {shapes[name]}"
      for name in both
      if tuple(weights[name].shape) != shapes[name]
    ],
    "of another type than float": [
      f"{name} is {weights[name].dtype}"
      for name in both
      if name not in floats and name not in integers
    ],
    "NaN or infinite": [
      name
      for name, arrays in floats.items()
      if not all(np.isfinite(array).all() for array in arrays)
    ],
    "beyond the range of float32": [
      name
      for name, arrays in floats.items()
      if any(_overflows(array) for array in arrays)
    ],
    "with negative variances": [
      name
      for name, arrays in floats.items()
      if re.split("[./]", name)[-1] in VARIANCES
      and any((array < 0).any() for array in arrays)
    ],
  }
  listed = [
    f"{len(names)} {problem} ({shorten(names)})"
    for problem, names in problems.items()
    if names
  ]
  if listed:
    # Only kernel and bias of one layer: most likely the classifier's.
    is_head = {n for n, names in problems.items() if names} == {
      "of another shape"
    } and len(problems["of another shape"]) <= 2
    raise errors.InputError(
      f"the weights do not fit the model: {'; '.join(listed)}. Choose other "
      "weights, or the model settings that they were trained with"
      + ", or give them as config.backbone to train a head anew"
      * is_head
    )


def _overflows(array: np.ndarray) -> bool:
  """Returns whether a finite entry is infinite in float32."""
  with np.errstate(over="ignore"):
    infinite = np.isinf(array.astype(np.float32, copy=False))
  return bool((infinite & np.isfinite(array)).any())


def shorten(names: Sequence[str]) -> str:
  """Joins the first few names and says how many more there are."""
  rest = len(names) - NUM_LISTED
  more = f", and {rest} more" if rest > 0 else ""
  return ", ".join(names[:NUM_LISTED]) + more


def torch_name(path: str) -> str:
  """Returns torch's name of a variable.

  'params/layer1/0/conv1/kernel' becomes 'layer1.0.conv1.weight'.

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
  """Returns the shape of a variable in torch.

  Args:
    path: of the variable.
    leaf: an array or a `jax.ShapeDtypeStruct`.

  Raises:
    InputError: torch has no kernels of this rank.
  """
  return tuple(leaf.shape[axis] for axis in _torch_axes(path, leaf))


def _torch_axes(path: str, leaf: Any) -> tuple[int, ...]:
  """Returns the axes of a Flax array in torch's order."""
  rank = len(leaf.shape)
  if path.rpartition("/")[2] != "kernel":
    return tuple(range(rank))
  if not 2 <= rank <= 5:
    raise errors.InputError(
      f"{path} of shape {tuple(leaf.shape)} has rank {rank}, but torch's "
      "kernels have rank 2 (linear) to 5 (three-dimensional convolution); "
      "map this layer in the load_torch of the model"
    )
  return (rank - 1, rank - 2, *range(rank - 2))

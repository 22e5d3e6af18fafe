"""Reads what `torch.save` wrote; nothing else here needs torch."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from pqf_jax import errors
from pqf_jax.models import torch_names

# What training scripts wrap a state dict in, next to epoch and optimizer.
WRAPPERS = ("state_dict", "model")
# The first bytes of what torch.save writes: a zip file, or, before torch 1.6,
# a pickled number.
TORCH_SAVE_STARTS = (b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19")


def read(path: str) -> torch_names.StateDict:
  """Reads {name: array} from a file of `torch.save`; needs torch.

  Torch unpickles tensors and plain containers only, so that no file can run
  code. The state dict may be the value of 'state_dict' or 'model'.

  Raises:
    InputError: torch is not installed; the file is damaged or of another
      format, or holds anything else than a state dict.
  """
  try:
    import torch
  except ImportError as error:
    raise errors.InputError(
      f"reading {path} needs torch, which is not installed: pip install torch, "
      "or convert the file by safetensors.torch.save_file where torch is"
    ) from error
  with open(path, "rb") as file:
    start = file.read(max(map(len, TORCH_SAVE_STARTS)))
  if not start.startswith(TORCH_SAVE_STARTS):
    raise errors.InputError(
      f"{path} is not a file that torch.save wrote; give one that is, or a "
      ".safetensors file"
    )
  try:
    content = torch.load(path, weights_only=True, map_location="cpu")
  except Exception as error:  # A damaged pickle may raise anything.
    raise _unreadable(path, error) from error
  entries = _entries(path, content, torch.Tensor)
  return {name: _to_numpy(tensor) for name, tensor in entries.items()}


def _unreadable(path: str, error: Exception) -> errors.InputError:
  """What torch.load said, without its advice to let the file run code."""
  asked = re.search(r"GLOBAL (\S+)", str(error))
  if asked:
    return errors.InputError(
      f"{path} asks for {asked[1]} to be called, which no file of weights "
      "needs; save what model.state_dict() gives, or convert the file by "
      "safetensors.torch.save_file where you trust it"
    )
  return errors.InputError(
    f"{path} is damaged or no file of weights "
    f"({str(error).partition('. ')[0] or type(error).__name__}); copy it "
    "again, or save what model.state_dict() gives"
  )


def _entries(path: str, content: Any, tensor_type: type) -> Mapping[str, Any]:
  """The state dict in what torch.load gave, which it may be wrapped in."""
  for wrapper in WRAPPERS:
    if isinstance(content, Mapping):
      inner = content.get(wrapper)
      content = inner if isinstance(inner, Mapping) else content
  if isinstance(content, Mapping):
    others = [
      f"{name} of type {type(value).__name__}"
      for name, value in content.items()
      if not isinstance(value, tensor_type)
    ]
  else:
    others = [f"a value of type {type(content).__name__}"]
  if others:
    raise errors.InputError(
      f"{path} holds {torch_names.shorten(others)}, where a state dict has "
      "tensors by name; save what model.state_dict() gives, as it is or under "
      f"the key {' or '.join(map(repr, WRAPPERS))}"
    )
  return content


def _to_numpy(tensor: Any) -> np.ndarray:
  tensor = tensor.detach().to_dense()
  try:
    return tensor.numpy()
  except TypeError:  # NumPy lacks bfloat16 and float8.
    return tensor.float().numpy()

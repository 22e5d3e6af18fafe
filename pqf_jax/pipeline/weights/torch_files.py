"""Reads what `torch.save` wrote; nothing else here needs torch."""

import argparse
import os
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from pqf_jax import errors
from pqf_jax.models import torch_names
from pqf_jax.runtime import progress

# What training scripts wrap a state dict in, next to epoch and optimizer; of
# several the first is taken, averages of the weights before the last ones.
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
WRAPPERS = (*AVERAGES, "state_dict", "model_state_dict", "model", "net")
# A counter among the weights of torch.optim.swa_utils.AveragedModel.
COUNTER = "n_averaged"
# The first bytes of what torch.save writes: a zip file, or, before torch 1.6,
# a pickled number.
TORCH_SAVE_STARTS = (b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19")


def read(path: str) -> torch_names.StateDict:
  """Reads {name: array} from a file of `torch.save`; needs torch.

  Torch unpickles tensors, plain containers and the arguments of training
  scripts (argparse) only, so that no file can run code. The state dict may be
  the value of one of `WRAPPERS`; where there are several, it is said which is
  read.

  Raises:
    InputError: torch is not installed; the file is damaged, compressed or of
      another format, or holds anything else than a state dict of plain tensors.
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
  _check_zip(path)
  try:
    with torch.serialization.safe_globals([argparse.Namespace]):
      content = torch.load(path, weights_only=True, map_location="cpu")
  except Exception as error:  # A damaged pickle may raise anything.
    raise _unreadable(path, error) from error
  entries = _entries(path, content, torch.Tensor)
  return {name: _to_numpy(path, name, x) for name, x in entries.items()}


def _check_zip(path: str) -> None:
  """Refuses a zip file whose entries are larger than the file itself."""
  if not zipfile.is_zipfile(path):
    return  # written before torch 1.6, or damaged, which torch.load finds
  try:
    with zipfile.ZipFile(path) as archive:
      needed = sum(entry.file_size for entry in archive.infolist())
  except zipfile.BadZipFile as error:
    raise _unreadable(path, error) from error
  if needed > os.path.getsize(path):
    raise errors.InputError(
      f"{path} is compressed: its {os.path.getsize(path):,} bytes claim to "
      f"hold {needed:,}, but torch.save stores tensors as they are; save the "
      "state dict again by torch.save"
    )


def _unreadable(path: str, error: Exception) -> errors.InputError:
  """Shortens an error of torch.load, whose advice is to let files run code."""
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
  """Returns the state dict, which may be inside a wrapper."""
  while isinstance(content, Mapping):
    inside = [w for w in WRAPPERS if isinstance(content.get(w), Mapping)]
    if not inside:
      break
    if len(inside) > 1:
      progress.say(f"{path}: {inside[0]!r} is read, not {inside[1]!r}")
    content = content[inside[0]]
  if isinstance(content, Mapping):
    others = [
      f"{name!r} of type {type(value).__name__}"
      for name, value in content.items()
      if not (isinstance(name, str) and isinstance(value, tensor_type))
    ]
  else:
    others = [f"a value of type {type(content).__name__}"]
  if others:
    raise errors.InputError(
      f"{path} holds {torch_names.shorten(others)}, where a state dict has "
      "tensors by name; save what model.state_dict() gives, as it is or under "
      f"the key {' or '.join(map(repr, WRAPPERS))}"
    )
  return {name: x for name, x in content.items() if name != COUNTER}


def _to_numpy(path: str, name: str, tensor: Any) -> np.ndarray:
  defects = {
    "without data, on the device 'meta'": tensor.is_meta,
    "quantized, in the form of torch": tensor.is_quantized,
    "nested": tensor.is_nested,
    f"sparse ({tensor.layout})": "strided" not in str(tensor.layout),
    "complex": tensor.is_complex(),
  }
  found = [defect for defect, is_so in defects.items() if is_so]
  # Storages that sparse and other tensors lack are not asked for their size.
  if not found and tensor.nbytes > tensor.untyped_storage().nbytes():
    found = ["larger than its data, as expand() makes them"]
  if found:
    raise errors.InputError(
      f"{path}: tensor {name!r} is {found[0]}; save plain float tensors, such "
      "as tensor.to_dense().dequantize().contiguous() gives"
    )
  tensor = tensor.detach().resolve_neg()
  try:
    return tensor.numpy()
  except TypeError:  # NumPy lacks bfloat16 and float8.
    return tensor.float().numpy()

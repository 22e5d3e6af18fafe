"""Stage 4: writes one `.safetensors` file, as small as the plan predicts.

Compressed kernels share two buffers, one after the other in the order of the
header's `layers`: `codes` (uint8, exactly ceil(N * log2(K) / 8) bytes a kernel,
little-endian bit by bit) and `codebooks` (float16, K * D numbers a kernel).
Each batch norm is one buffer `<path>.norm` (float32 [2, C]: scale and bias with
mean and variance folded in), and every other variable a buffer by its path, in
float32. The JSON header is the metadata `pqf_jax`. Two separate buffers for
each kernel would cost a small network more than 2 % in names.
Loading needs no training code and no pickle.
"""

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy

from pqf_jax import errors
from pqf_jax.core import blocks, trees, vq_array
from pqf_jax.core import plan as plans
from pqf_jax.runtime import files

PyTree = Any
FORMAT_VERSION = 2
CODES, CODEBOOKS = "codes", "codebooks"
METADATA_KEY = "pqf_jax"


class PackedModel(NamedTuple):
  """Content of a packed file.

  Attributes:
    header: {format, architecture, norm_epsilon, layers: {path: [shape,
      channels, K]}, sha256 of the buffers}.
    buffers: {name: array}; see the module docstring.
  """

  header: dict[str, Any]
  buffers: dict[str, np.ndarray]

  @property
  def payload_bytes(self) -> int:
    """Returns the bytes of all buffers; the file adds its header."""
    return sum(buffer.nbytes for buffer in self.buffers.values())


def pack_model(
  variables: PyTree,
  *,
  norm_epsilon: float | None,
  architecture: Mapping[str, Any],
) -> PackedModel:
  """Packs a variable tree; see the module docstring for the layout.

  Args:
    variables: Linen variables with `VQArray`s, or all dense.
    norm_epsilon: epsilon of the batch norms; None for a network without any.
    architecture: JSON data that identifies the model for programs that load it.

  Raises:
    InputError: float16 or float32 cannot hold a value; or `norm_epsilon` is
      None although there are batch norms.
  """
  flat = trees.flatten(jax.device_get(variables), vq_array.is_vq)
  layers = {path: leaf for path, leaf in flat.items() if vq_array.is_vq(leaf)}
  norms = plans.foldable_norms(flat)
  if norm_epsilon is None:
    if norms:
      raise errors.InputError(
        f"{len(norms)} batch norms, such as {next(iter(norms))}, cannot be "
        "folded without their epsilon; pass norm_epsilon"
      )
    norm_epsilon = 0.0
  buffers = {}
  if layers:
    buffers[CODES] = np.concatenate(
      [pack_codes(n.codes, n.codebook.shape[-2]) for n in layers.values()]
    )
    buffers[CODEBOOKS] = np.concatenate(
      [_cast(p, n.codebook, np.float16).ravel() for p, n in layers.items()]
    )
  for norm, members in norms.items():
    scale, bias, mean, var = (np.float64(flat[path]) for path in members)
    slope = scale / np.sqrt(var + norm_epsilon)
    folded = np.stack([slope, bias - mean * slope])
    buffers[f"{norm}.norm"] = _cast(norm, folded, np.float32)
  written = {path for members in norms.values() for path in members}
  for path in flat.keys() - written - layers.keys():
    buffers[path] = _cast(path, flat[path], np.float32)
  header = {
    "format": FORMAT_VERSION,
    "architecture": dict(architecture),
    "norm_epsilon": norm_epsilon,
    "layers": {
      path: [node.kernel_shape, node.spec.channels, node.codebook.shape[-2]]
      for path, node in layers.items()
    },
    "sha256": files.digest_arrays(sorted(buffers.items())),
  }
  return PackedModel(header, buffers)


def unpack_model(packed: PackedModel) -> PyTree:
  """Returns the variable tree of a packed model, with float32 codebooks.

  Norms get mean 0 and variance 1 - epsilon, so that the layer divides by 1 and
  the folded scale and bias apply as they are.
  """
  header, buffers = packed
  epsilon = header["norm_epsilon"]
  flat: dict[str, Any] = _unpack_layers(header["layers"], buffers)
  for name, buffer in buffers.items():
    path, _, kind = name.rpartition(".")
    if kind == "norm":
      scale, bias = buffer
      flat[f"params/{path}/scale"], flat[f"params/{path}/bias"] = scale, bias
      flat[f"batch_stats/{path}/mean"] = np.zeros_like(scale)
      flat[f"batch_stats/{path}/var"] = np.full_like(scale, 1 - epsilon)
    elif name not in (CODES, CODEBOOKS):
      flat[name] = buffer
  return trees.nest(flat)


def save(
  path: str | os.PathLike[str],
  variables: PyTree,
  *,
  norm_epsilon: float = 1e-5,
  architecture: Mapping[str, Any] | None = None,
) -> PackedModel:
  """Packs a variable tree (see `pack_model`) and writes the file (`write`)."""
  packed = pack_model(
    variables, norm_epsilon=norm_epsilon, architecture=architecture or {}
  )
  write(path, packed)
  return packed


def write(path: str | os.PathLike[str], packed: PackedModel) -> None:
  """Writes a packed model into a file, whole or not at all."""
  metadata = {METADATA_KEY: json.dumps(packed.header, separators=(",", ":"))}
  data = safetensors.numpy.save(packed.buffers, metadata=metadata)
  files.write(path, data)


def read(path: str | os.PathLike[str]) -> PackedModel:
  """Reads a packed file and checks it.

  Raises:
    InputError: the file is missing, damaged, of another format, or not packed
      by this library.
  """
  file = files.fetch(path)
  header = read_header(file)
  if header is None:
    raise errors.InputError(
      f"{path} is a safetensors file that pqf_jax did not pack; for torch "
      "weights use --config.weights or pqf_jax.models"
    )
  if header["format"] != FORMAT_VERSION:
    raise errors.InputError(
      f"{path} has format {header['format']}, but this version of pqf_jax "
      f"reads {FORMAT_VERSION}; use the version that wrote it, or pack it again"
    )
  buffers = safetensors.numpy.load_file(file)
  if files.digest_arrays(sorted(buffers.items())) != header["sha256"]:
    raise errors.InputError(
      f"{path} is damaged: its content does not match its sha256 "
      f"{header['sha256'][:12]}...; copy or pack it again"
    )
  return PackedModel(header, buffers)


def read_header(path: str | os.PathLike[str]) -> dict[str, Any] | None:
  """Returns the header of a packed file; None for other safetensors files.

  Raises:
    InputError: the file is missing, truncated, or not safetensors.
  """
  try:
    with safetensors.safe_open(files.fetch(path), framework="numpy") as content:
      metadata = content.metadata() or {}
  except safetensors.SafetensorError as error:
    raise errors.InputError(
      f"{path} is truncated or not a safetensors file: {error}"
    ) from error
  return json.loads(metadata.get(METADATA_KEY, "null"))


def load(path: str | os.PathLike[str]) -> PyTree:
  """Reads a packed file as variables for `model.apply`; see `read`."""
  return unpack_model(read(path))


def pack_codes(codes: trees.Array, num_codes: int) -> np.ndarray:
  """Packs codes into uint8 [ceil(N * log2(K) / 8)], lowest bit first."""
  bits = np.arange(plans.code_bits(num_codes))
  flat = np.asarray(codes).reshape(-1, 1).astype(np.uint32)
  return np.packbits((flat >> bits & 1).astype(np.uint8), bitorder="little")


def unpack_codes(packed: np.ndarray, num_codes: int, count: int) -> np.ndarray:
  """Unpacks codes into [count] of the smallest unsigned type."""
  num_bits = plans.code_bits(num_codes)
  bits = np.unpackbits(packed, count=count * num_bits, bitorder="little")
  values = bits.reshape(count, num_bits) @ (1 << np.arange(num_bits))
  return values.astype(vq_array.code_dtype(num_codes))


def _unpack_layers(
  layers: Mapping[str, list[Any]], buffers: Mapping[str, np.ndarray]
) -> dict[str, vq_array.VQArray]:
  nodes, code_start, entry_start = {}, 0, 0
  for path, (shape, channels, num_codes) in layers.items():
    spec = blocks.BlockSpec(channels)
    c_out, m, length = spec.layout(shape)
    code_end = code_start + plans.code_bytes(c_out * m, num_codes)
    entry_end = entry_start + num_codes * length
    packed = buffers[CODES][code_start:code_end]
    codebook = buffers[CODEBOOKS][entry_start:entry_end].astype(np.float32)
    nodes[path] = vq_array.VQArray(
      codebook.reshape(num_codes, length),
      unpack_codes(packed, num_codes, c_out * m).reshape(c_out, m),
      tuple(shape),
      spec,
    )
    code_start, entry_start = code_end, entry_end
  return nodes


def _cast(path: str, value: trees.Array, dtype: type) -> np.ndarray:
  value = np.asarray(value)
  if not np.issubdtype(value.dtype, np.floating):
    return value
  with np.errstate(over="ignore"):
    cast: np.ndarray = np.ascontiguousarray(value, dtype=dtype)
  if not np.isfinite(cast).all():
    raise errors.InputError(
      f"{path} has values up to {np.abs(value).max():g}, which "
      f"{np.dtype(dtype)} cannot hold; use a checkpoint of a stable training"
    )
  return cast

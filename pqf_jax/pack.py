"""Stage 4: writes one `.safetensors` file, as small as the plan predicts.

Compressed kernels share two buffers: codes with exactly ceil(N * log2(K) / 8)
bytes a kernel, and codebooks, K * D numbers a kernel. Two buffers for each
kernel would cost a small network more than 2 % in names. Where kernels are
compressed, each batch norm is one buffer, scale and bias with mean and variance
folded in; a file without any keeps the statistics, so that training may go on
from it. Every other variable is a buffer of its own. `Storage` says of which
types: float16 codebooks and the rest as it is, or smaller. The JSON header is
the metadata `pqf_jax`; `packing/header.py` describes it. Files of format 2 are
read as they were. Loading needs no training code and no pickle.
"""

import functools
import io
import json
import os
from collections.abc import Callable, Mapping
from concurrent import futures
from typing import Any, BinaryIO, NamedTuple, TypeVar

import jax
import numpy as np

from pqf_jax import errors
from pqf_jax.core import plan as plans
from pqf_jax.core import storage as storages
from pqf_jax.core import vq_array
from pqf_jax.packing import (
  container,
  header,
  layers,
  norms,
  scaling,
  structure,
  templates,
)
from pqf_jax.runtime import files

PyTree = Any
T = TypeVar("T")
METADATA_KEY = "pqf_jax"


class PackedModel(NamedTuple):
  """Content of a packed file.

  Attributes:
    header: see `packing/header.py`.
    buffers: {name: array}; see the module docstring. Those of a file that was
      read are read-only views of its bytes.
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
  norm_epsilon: float | Mapping[str, float] | None,
  architecture: Mapping[str, Any],
  storage: storages.Storage = storages.PAPER,
) -> PackedModel:
  """Packs a variable tree; see the module docstring for the layout.

  Args:
    variables: a tree or module of arrays and `VQArray`s. Dicts, lists, tuples
      and None come back as they are, other nodes in a template (`load`); but
      for codebooks, folded norms and what the storage rounds.
    norm_epsilon: of the batch norms that are folded, those of a network with
      `VQArray`s: of all, or {full-match pattern (regex) of the norm's path,
      such as `layer1/0/bn1`: epsilon}, where the first match wins. None where
      no norm is folded.
    architecture: JSON data that identifies the model for programs that load
      it.
    storage: types of codebooks and of the rest.

  Raises:
    InputError: a leaf or a type that a file cannot hold, a number that is not
      finite or too large for the file, a norm without an epsilon or a
      pattern without a norm, an architecture that is not JSON, or a codebook or
      norm of which the storage would keep too little; or no `Storage`.
  """
  storages.check(storage)
  leaves, nodes = structure.take_apart(variables, vq_array.is_vq)
  kernels = {
    path: layers.pack(path, leaf, storage)
    for path, leaf in sorted(leaves.items())
    if vq_array.is_vq(leaf)
  }
  members = plans.foldable_norms(leaves) if kernels else {}
  epsilons = norms.choose_epsilons(members, norm_epsilon)
  folded = {path for paths in members.values() for path in paths}
  rest = {
    norm + header.NORM: norms.fold(
      norm, [leaves[path] for path in paths], epsilons[norm], storage
    )
    for norm, paths in members.items()
  } | dict(
    _store(path, leaves[path], storage)
    for path in leaves.keys() - folded - kernels.keys()
  )
  buffers = {name: scaled.numbers for name, scaled in rest.items()}
  if kernels:
    parts = kernels.values()
    buffers[header.CODES] = np.concatenate([codes for _, codes, _ in parts])
    buffers[header.CODEBOOKS[storage.codebook]] = np.concatenate(
      [codebook.ravel() for _, _, codebook in parts]
    )
  exponents = {name: x.exponent for name, x in rest.items() if x.exponent}
  common, entries = _share(
    {path: layers.to_fields(layer) for path, (layer, _, _) in kernels.items()}
  )
  fields = {
    "architecture": _plain(architecture),
    "common": common,
    "format": header.VERSION,
    "layers": entries,
    "nodes": nodes,
    "norm_epsilon": _one_if_alike(epsilons),
  } | ({header.EXPONENTS: exponents} if exponents else {})
  fields[header.SHA256] = header.digest(fields, buffers)
  return PackedModel(fields, buffers)


def unpack_model(packed: PackedModel) -> PyTree:
  """Returns the variable tree of a packed model.

  Folded norms get mean 0 and variance 1 - epsilon, so that the layer divides by
  1 and the folded scale and bias apply as they are.

  Raises:
    InputError: see `packing.header.check`.
  """
  return _build(header.check(*packed))


def save(
  path: str | os.PathLike[str],
  variables: PyTree,
  *,
  norm_epsilon: float | Mapping[str, float] | None = None,
  architecture: Mapping[str, Any] | None = None,
  storage: storages.Storage = storages.PAPER,
) -> PackedModel:
  """Packs a variable tree (see `pack_model`) and writes the file (`write`)."""
  packed = pack_model(
    variables,
    norm_epsilon=norm_epsilon,
    architecture={} if architecture is None else architecture,
    storage=storage,
  )
  write(path, packed)
  return packed


def write(path: str | os.PathLike[str], packed: PackedModel) -> None:
  """Writes a packed model into a file, whole or not at all; ~ is expanded."""
  files.write(files.absolute(path), to_bytes(packed))


def to_bytes(packed: PackedModel) -> bytes:
  """Returns the bytes of a packed model's file."""
  metadata = {METADATA_KEY: header.canonical(packed.header)}
  return container.write(packed.buffers, metadata)


def read(path: str | os.PathLike[str]) -> PackedModel:
  """Reads a packed file and checks all of it.

  Raises:
    InputError: the file is missing, damaged, of another format, or not packed
      by this library.
  """
  return read_contents(path)[0]


def read_contents(
  path: str | os.PathLike[str],
) -> tuple[PackedModel, header.Contents]:
  """Reads a packed file, and what its header says of it; see `read`."""
  return _open(path, _read_stream)


def load(path: str | os.PathLike[str], template: PyTree = None) -> PyTree:
  """Reads a packed file as variables for `model.apply`; see `read`.

      model = pqf_jax.load(path, nnx.eval_shape(lambda: Net(nnx.Rngs(0))))

  Args:
    path: of the file.
    template: a tree or module of the structure that was saved, which gets the
      variables of the file; shapes suffice. What is no array, and random keys,
      are those of the template. None: dicts, lists, tuples and None come back
      as they were, an NNX module as the nested dicts of its variables.

  Where kernels are compressed, norms are folded (see `unpack_model`): exact
  when they use running averages, another function when they are trained on the
  statistics of batches. Takes at most twice the bytes of the file besides the
  result. The file may be replaced meanwhile, as `save` does, not cut.

  Raises:
    InputError: see `read`; the template has other variables than the file, or
      of another shape or type; or the file needs a template and there is none.
  """
  read_mapped = functools.partial(_read_stream, mapped=True)
  _, contents = _open(path, read_mapped)
  if template is None:
    return _build(contents)
  return templates.fill(template, _leaves(contents))


def from_bytes(data: bytes) -> tuple[PackedModel, header.Contents]:
  """Reads and checks the bytes of a packed file; see `read`."""
  return _read_stream(io.BytesIO(data), len(data))


def read_header(path: str | os.PathLike[str]) -> dict[str, Any] | None:
  """Returns the header of a packed file; None for other safetensors files.

  Only the header is read, and of it only the format is checked.

  Raises:
    InputError: the file is missing, truncated, of another format, or not
      safetensors.
  """

  def parse(stream: BinaryIO, size: int) -> dict[str, Any] | None:
    text = container.read_metadata(stream, size).get(METADATA_KEY)
    return None if text is None else header.parse(text)

  return _open(path, parse)


def _read_stream(
  stream: BinaryIO, size: int, *, mapped: bool = False
) -> tuple[PackedModel, header.Contents]:
  metadata, buffers = container.read(stream, size, mapped=mapped)
  text = metadata.get(METADATA_KEY)
  if text is None:
    raise errors.InputError(
      "it is a safetensors file that pqf_jax did not pack; for torch weights "
      "use --config.weights or pqf_jax.models"
    )
  fields = header.parse(text)
  header.check_digest(text, fields, buffers)
  return PackedModel(fields, buffers), header.check(fields, buffers)


def _open(
  path: str | os.PathLike[str], read_from: Callable[[BinaryIO, int], T]
) -> T:
  """Calls a function with a file and its size; errors name the file."""
  file = files.fetch(path)
  try:
    with open(file, "rb") as stream:
      return read_from(stream, os.path.getsize(file))
  except errors.InputError as error:
    # A name in the file may be as long as the file, or of several lines.
    reason = " ".join(str(error).split())[:500]
    raise errors.InputError(
      f"{path} is not a packed file that can be read: {reason}; copy or pack "
      "it again"
    ) from error


def _build(contents: header.Contents) -> PyTree:
  others = [path for path, kind in contents.nodes.items() if kind == "node"]
  if others:
    raise errors.InputError(
      f"the file holds nodes of other types than dicts, lists and tuples "
      f"({len(others)}, such as {others[0] or 'the root'!r}); give "
      "pqf_jax.load(path, template), a tree or module of the same structure"
    )
  return structure.put_together(_leaves(contents), contents.nodes)


def _leaves(contents: header.Contents) -> dict[str, Any]:
  """Returns {path: variable} of a file."""
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    kernels = pool.map(lambda x: layers.unpack(*x), contents.layers.values())
  leaves: dict[str, Any] = dict(zip(contents.layers, kernels, strict=True))
  for norm, (epsilon, folded) in contents.norms.items():
    values = norms.unfold(epsilon, folded)
    for member, value in zip(plans.NORM, values, strict=True):
      leaves[member.format(norm)] = value
  # Copies, because a view would keep the bytes of the whole file.
  return leaves | {
    path: dense.restore() for path, dense in contents.dense.items()
  }


def _store(
  path: str, leaf: Any, storage: storages.Storage
) -> tuple[str, scaling.Scaled]:
  """Returns a leaf that stays dense, under the name of its buffer."""
  array = _array(path, leaf)
  if storage.rounds(structure.name(path), array):
    return path + header.HALF, scaling.halve(array)
  return path, scaling.Scaled(array, 0, array.dtype)


def _array(path: str, leaf: Any) -> np.ndarray:
  """Returns a leaf as an array of a type that a file can hold."""
  if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(
    leaf.dtype, jax.dtypes.prng_key
  ):
    raise errors.InputError(
      f"{path} is a random key of type {leaf.dtype}, which a packed file "
      "cannot hold; give jax.random.key_data(key)"
    )
  array = np.asarray(leaf)
  if array.dtype not in container.TYPES.values():
    raise errors.InputError(
      f"{path} is of type {array.dtype}, which a packed file cannot hold; "
      f"convert it to one of {', '.join(map(str, container.TYPES.values()))}"
    )
  header.check_numbers(path, array)
  return array


def _share(
  entries: Mapping[str, dict[str, Any]],
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
  """Parts the fields that all layers have alike from the others."""
  rows = list(entries.values())
  common = {
    name: rows[0][name]
    for name in (layers.FIELDS if rows else ())
    if all(row[name] == rows[0][name] for row in rows)
  }
  return common, {
    path: {name: row[name] for name in row.keys() - common.keys()}
    for path, row in entries.items()
  }


def _one_if_alike(
  values: dict[str, float],
) -> float | dict[str, float] | None:
  different = set(values.values())
  if len(different) > 1:
    return values
  return next(iter(different), None)


def _plain(architecture: Mapping[str, Any]) -> Any:
  """Returns JSON data as a file gives it back.

  Raises:
    InputError: it is not JSON, or not an object.
  """
  layers.check(
    isinstance(architecture, Mapping), "architecture", architecture, "a dict"
  )
  try:
    return json.loads(header.canonical(architecture))
  except (TypeError, ValueError) as error:
    raise errors.InputError(
      f"architecture is not JSON data ({error}); give text, numbers, lists and "
      "dicts with text as keys"
    ) from error

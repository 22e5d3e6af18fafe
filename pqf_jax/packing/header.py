"""The header of a packed file, and the one check of all that is read.

    {"architecture": {...}, "common": {field: value}, "format": 3,
     "layers": {path: {field: value}}, "nodes": {path: kind},
     "norm_epsilon": null | epsilon | {norm: epsilon}, "sha256": "..."}

as canonical JSON: sorted names, no spaces. Fields that all layers share are in
`common`; `layers.FIELDS` lists them. Stacked layers have `layers.STACK` too,
and their codes and codebooks lie as in the arrays. Buffers have the path of
their variable, in its own type, but for

    ~codes         of all layers, in their order
    ~codebooks     float16, of layers that have such, in their order
    ~codebooks8    int8, likewise
    <path>~norm    a batch norm with folded statistics, [scale, bias], float32
                   or rounded to float16
    <path>~half    a float32 variable that is rounded to float16

which no path can be, see `structure`. A field more, `"exponents": {buffer:
integer}`, is there only where rounded buffers are times a power of two.
"""

import collections
import hashlib
import json
import numbers
import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pqf_jax import errors
from pqf_jax.core import plan as plans
from pqf_jax.packing import container, layers, scaling, structure
from pqf_jax.runtime import files

VERSION = 3
READ = (2, VERSION)
SHA256 = "sha256"
CODES, NORM, HALF = "~codes", "~norm", "~half"
CODEBOOKS = {"float16": "~codebooks", "int8": "~codebooks8"}
# Buffers of all layers together, and their types.
_SHARED = {CODES: "uint8"} | {name: dtype for dtype, name in CODEBOOKS.items()}
FIELDS = (
  *("architecture", "common", "format", "layers", "nodes", "norm_epsilon"),
  SHA256,
)
EXPONENTS = "exponents"
_MOST_EXPONENT = 200

Header = dict[str, Any]
Buffers = Mapping[str, np.ndarray]


class Contents(NamedTuple):
  """What a packed file holds, checked.

  Attributes:
    layers: {path: (layer, its codes, its codebook)}, the last two as stored.
    norms: {norm: (epsilon, [scale, bias])}, the last as stored.
    dense: {path: array as stored}.
    nodes: {path: kind}, see `structure`.
  """

  layers: dict[str, tuple[layers.Layer, np.ndarray, np.ndarray]]
  norms: dict[str, tuple[float, scaling.Scaled]]
  dense: dict[str, scaling.Scaled]
  nodes: dict[str, str]


def canonical(header: Mapping[str, Any]) -> str:
  """Returns the one text of a header.

  Raises:
    ValueError: it holds what JSON cannot, such as NaN, or is nested too deeply.
  """
  try:
    return json.dumps(
      header, sort_keys=True, separators=(",", ":"), allow_nan=False
    )
  except RecursionError as error:
    raise ValueError("it is nested too deeply") from error


def digest(header: Mapping[str, Any], buffers: Buffers) -> str:
  """Returns the sha256 of a header without that field, and of all buffers."""
  content = files.digest_arrays(sorted(buffers.items()))
  if header["format"] == 2:
    return content
  rest = {name: header[name] for name in header if name != SHA256}
  return hashlib.sha256(f"{canonical(rest)}{content}".encode()).hexdigest()


def parse(text: str) -> Header:
  """Parses the text of a header, of which only the format is checked.

  Raises:
    InputError: it is not JSON, or of a format that is not read here.
  """
  try:
    header = container.read_json(text)
  except ValueError as error:
    raise errors.InputError(f"the header is damaged: {error}") from error
  if not isinstance(header, dict):
    raise errors.InputError("the header is damaged: it is not a JSON object")
  if "format" not in header:
    raise errors.InputError("the header has no field 'format'")
  version = header["format"]
  if type(version) is not int or version not in READ:
    raise errors.InputError(
      f"format is {reprlib.repr(version)}, but this version of pqf_jax reads "
      f"{' and '.join(map(str, READ))}; use the version that wrote it"
    )
  return header


def check_digest(text: str, header: Header, buffers: Buffers) -> None:
  """Refuses a header or buffers that are not what was written.

  Raises:
    InputError: there is no digest, or it does not match.
  """
  stored: Any = header.get(SHA256)
  layers.check(isinstance(stored, str), SHA256, stored, "a digest")
  try:
    written = header["format"] == 2 or text == canonical(header)
    intact = written and digest(header, buffers) == stored
  except ValueError:
    intact = False
  if not intact:
    raise errors.InputError(
      f"it is damaged: its content does not match its sha256 {stored[:12]}..."
    )


def check(header: Header, buffers: Buffers) -> Contents:
  """Checks all of a packed file, before anything is made of it.

  Raises:
    InputError: a field is missing, unknown or has a value that cannot be;
      buffers are of another type or size than the header says; a code has no
      codeword, a number is not finite; or paths do not make a tree.
  """
  if header["format"] == 2:
    header, buffers = _upgrade(header, buffers)
  header = {EXPONENTS: {}} | header
  layers.check_names("the header", header, (*FIELDS, EXPONENTS))
  for name in ("architecture", "common", EXPONENTS, "layers", "nodes"):
    layers.check(
      isinstance(header[name], dict), name, header[name], "an object"
    )
  found = _check_layers(header["common"], header["layers"], buffers)
  rest = _check_rest(header[EXPONENTS], buffers)
  dense = [name for name in rest if not name.endswith(NORM)]
  contents = Contents(
    found,
    _check_norms(header["norm_epsilon"], rest),
    {name.removesuffix(HALF): rest[name] for name in dense},
    header["nodes"],
  )
  for path, kind in contents.nodes.items():
    known = isinstance(kind, str) and kind in structure.KINDS
    expected = " or ".join(structure.KINDS)
    layers.check(known, f"nodes/{path}", kind, expected)
  paths = [*contents.layers, *(name.removesuffix(HALF) for name in dense)]
  paths += [name.format(norm) for norm in contents.norms for name in plans.NORM]
  twice = [path for path, n in collections.Counter(paths).items() if n > 1]
  layers.check(not twice, "the list of variables", twice, "each path once")
  structure.put_together(dict.fromkeys(paths, ()), contents.nodes)
  return contents


def check_numbers(path: str, array: np.ndarray) -> None:
  """Refuses floats that are NaN or infinite.

  Raises:
    InputError: names the variable and its largest number.
  """
  floats = jnp.issubdtype(array.dtype, jnp.floating)
  if floats and not np.isfinite(array).all():
    raise errors.InputError(
      f"{path} has values up to {float(np.abs(array).max()):g}; use a "
      "checkpoint of a stable training"
    )


def _check_layers(
  common: dict[str, Any], entries: dict[str, Any], buffers: Buffers
) -> dict[str, tuple[layers.Layer, np.ndarray, np.ndarray]]:
  found = {}
  shared = bool(entries) or not common
  layers.check(shared, "common", common, "no field without a layer")
  for path, fields in entries.items():
    where = f"layers/{path}"
    layers.check(isinstance(fields, dict), where, fields, "an object")
    twice = sorted(fields.keys() & common.keys())
    layers.check(not twice, where, twice, "no field that is in common")
    found[path] = layers.from_fields(path, common | fields)
  needed: collections.Counter[str] = collections.Counter()
  for layer in found.values():
    needed[CODES] += layer.code_bytes
    needed[CODEBOOKS[layer.codebook]] += layer.codebook_size
  for name, dtype in _SHARED.items():
    buffer = buffers.get(name, np.empty(0, dtype))
    if buffer.dtype != dtype or buffer.shape != (needed[name],):
      raise errors.InputError(
        f"buffer {name!r} is {buffer.dtype} {buffer.shape}, but the "
        f"{len(found)} layers need {dtype} ({needed[name]},)"
      )
  ends: collections.Counter[str] = collections.Counter()

  def take(name: str, count: int) -> np.ndarray:
    ends[name] += count
    return buffers[name][ends[name] - count : ends[name]]

  parts = {}
  for path, layer in found.items():
    codes = take(CODES, layer.code_bytes)
    codebook = take(CODEBOOKS[layer.codebook], layer.codebook_size)
    layers.check_values(path, layer, codes, codebook)
    parts[path] = layer, codes, codebook
  return parts


def _check_rest(
  exponents: dict[str, Any], buffers: Buffers
) -> dict[str, scaling.Scaled]:
  """Returns {buffer: its numbers}, of buffers that are not all layers'."""
  rest, rounded = {}, []
  for name in (name for name in buffers if name not in _SHARED):
    buffer = buffers[name]
    dtype = buffer.dtype
    if name.endswith(HALF) or (name.endswith(NORM) and dtype == np.float16):
      layers.check(
        dtype == np.float16, f"buffer {name!r}", dtype.name, "float16"
      )
      rounded.append(name)
      dtype = np.dtype(np.float32)
    check_numbers(name.removesuffix(HALF).removesuffix(NORM), buffer)
    rest[name] = scaling.Scaled(buffer, 0, dtype)
  unknown = sorted(exponents.keys() - set(rounded))
  layers.check(not unknown, "exponents", unknown, "none of other buffers")
  for name, exponent in exponents.items():
    whole = type(exponent) is int and abs(exponent) <= _MOST_EXPONENT
    rest[name] = rest[name]._replace(exponent=exponent if whole else 0)
    layers.check(
      whole and rest[name].is_finite(),
      f"exponents/{name}",
      exponent,
      "an integer under which float32 overflows nowhere",
    )
  return rest


def _check_norms(
  epsilon: Any, rest: Mapping[str, scaling.Scaled]
) -> dict[str, tuple[float, scaling.Scaled]]:
  """Returns {norm: (epsilon, [scale, bias])}."""
  norms = {
    name.removesuffix(NORM): rest[name] for name in rest if name.endswith(NORM)
  }
  if isinstance(epsilon, dict):
    given = epsilon
    layers.check_names("norm_epsilon", given, tuple(norms))
  else:
    needed = epsilon is not None or not norms
    layers.check(needed, "norm_epsilon", epsilon, f"that of {len(norms)} norms")
    given = dict.fromkeys(norms, epsilon)
    if epsilon is not None:
      check_epsilon("norm_epsilon", epsilon)
  for norm, value in given.items():
    check_epsilon(f"norm_epsilon/{norm}", value)
    dtype, shape = norms[norm].dtype, norms[norm].numbers.shape
    if dtype != np.float32 or shape[:1] != (2,):
      raise errors.InputError(
        f"buffer {norm + NORM!r} is {dtype} {shape} where float32 or float16 "
        "(2, ...) is expected"
      )
  return {norm: (given[norm], norms[norm]) for norm in norms}


def check_epsilon(name: str, value: Any) -> None:
  """Refuses what no batch norm could add to its variance.

  Raises:
    InputError: it is not a number from 0 to 1.
  """
  number = isinstance(value, numbers.Real) and not isinstance(value, bool)
  layers.check(number and 0 <= value < 1, name, value, "a number from 0 to 1")


def _upgrade(header: Header, buffers: Buffers) -> tuple[Header, Buffers]:
  """Returns a file of format 2 as one of the present format.

  There a layer was [shape, channels, K], each '/' of a name parted two keys,
  all norms had one epsilon, and the names of special buffers had no '~'.
  """
  layers.check_names(
    "the header",
    header,
    ("architecture", "format", "layers", "norm_epsilon", SHA256),
  )
  entries = header["layers"]
  layers.check(isinstance(entries, dict), "layers", entries, "an object")
  upgraded = {}
  for path, fields in entries.items():
    triple = isinstance(fields, list) and len(fields) == 3
    expected = "[shape, channels, num_codes]"
    layers.check(triple, f"layers/{path}", fields, expected)
    shape, channels, num_codes = fields
    upgraded[_upgrade_name(path)] = {
      "shape": shape,
      "channels": channels,
      "num_codes": num_codes,
    }
  common = {
    "in_axis": -2,
    "out_axis": -1,
    "codebook": "float16",
    "dtype": "float32",
    "exponent": 0,
    "coding": layers.CODING,
  }
  epsilon = header["norm_epsilon"]
  check_epsilon("norm_epsilon", epsilon)
  return header | {
    "format": VERSION,
    "common": common if upgraded else {},
    "layers": upgraded,
    "nodes": {},
  }, {_upgrade_name(name): array for name, array in buffers.items()}


def _upgrade_name(name: str) -> str:
  if name in ("codes", "codebooks"):
    return f"~{name}"
  path, dot, kind = name.rpartition(".")
  if dot and kind == "norm":
    return structure.path_of(path.split("/")) + NORM
  return structure.path_of(name.split("/"))

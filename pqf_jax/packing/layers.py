"""Compressed kernels: what the header says of each, and their buffers.

A codebook is float16 or int8 times a power of two, see `scaling`.
"""

import numbers
import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pqf_jax import errors
from pqf_jax.core import blocks, trees, vq_array
from pqf_jax.core import plan as plans
from pqf_jax.core import storage as storages
from pqf_jax.packing import bits, scaling

# Types of a codebook in memory.
_FLOATS = ("bfloat16", "float16", "float32", "float64")
TYPES = {name: jnp.dtype(name) for name in _FLOATS}
MAX_CODES = 1 << 16
CODING = "fixed"
# int8 may lose so much of the energy of a kernel; .0034 is the most that was
# seen of a trained one.
_MOST_LOST = 0.01


class Layer(NamedTuple):
  """What a file says of a compressed kernel.

  Attributes:
    shape: dense shape.
    spec: the layout of its sub-vectors.
    num_codes: K.
    codebook: type of the codebook in the file, see `Storage`.
    dtype: type of the codebook in memory.
    exponent: the codebook is 2^exponent times what is stored.
  """

  shape: tuple[int, ...]
  spec: blocks.BlockSpec
  num_codes: int
  codebook: str
  dtype: np.dtype[Any]
  exponent: int

  @property
  def code_bytes(self) -> int:
    """Returns the bytes of its codes."""
    c_out, m, _ = self.spec.layout(self.shape)
    return plans.code_bytes(c_out * m, self.num_codes)

  @property
  def codebook_size(self) -> int:
    """Returns the numbers of its codebook, K * D."""
    return self.num_codes * self.spec.layout(self.shape)[2]


FIELDS = (
  *("shape", "channels", "in_axis", "out_axis", "num_codes"),
  *("codebook", "dtype", "exponent", "coding"),
)


def to_fields(layer: Layer) -> dict[str, Any]:
  """Returns the fields of a layer in the header."""
  return {
    "shape": list(map(_plain, layer.shape)),
    "channels": _plain(layer.spec.channels),
    "in_axis": _axes_field(layer.spec.in_axes),
    "out_axis": _axes_field(layer.spec.out_axes),
    "num_codes": layer.num_codes,
    "codebook": layer.codebook,
    "dtype": layer.dtype.name,
    "exponent": layer.exponent,
    "coding": CODING,
  }


def _axes_field(axes: tuple[int, ...]) -> Any:
  """Returns one axis as a number, others as a list."""
  plain = list(map(_plain, axes))
  return plain[0] if len(plain) == 1 else plain


def _plain(number: Any) -> Any:
  """Returns an integer of NumPy as one of Python, all else as it is."""
  return int(number) if isinstance(number, numbers.Integral) else number


def from_fields(path: str, fields: Mapping[str, Any]) -> Layer:
  """Reads the fields of a layer; undoes `to_fields`.

  Raises:
    InputError: a field is missing, unknown or has a value that cannot be.
  """
  where = f"layers/{path}"
  check_names(where, fields, FIELDS)

  def take(name: str, valid: bool, expected: str) -> Any:
    check(valid, f"{where}/{name}", fields[name], expected)
    return fields[name]

  def take_integer(name: str, low: int, high: int) -> int:
    valid = type(fields[name]) is int and low <= fields[name] <= high
    return int(take(name, valid, f"a whole number from {low} to {high}"))

  def take_axes(name: str) -> tuple[int, ...]:
    value = fields[name]
    axes = value if isinstance(value, list) else [value]
    valid = all(type(n) is int and -rank <= n < rank for n in axes)
    take(name, valid, f"axes from {-rank} to {rank - 1}")
    return tuple(axes)

  def take_name(name: str, known: tuple[str, ...]) -> str:
    text = isinstance(fields[name], str)
    return str(take(name, text and fields[name] in known, " or ".join(known)))

  shape = fields["shape"]
  sizes = isinstance(shape, list) and all(
    type(n) is int and 1 <= n < 1 << 40 for n in shape
  )
  take("shape", sizes and 2 <= len(shape) <= 32, "2 to 32 positive sizes")
  rank = len(shape)
  spec = blocks.BlockSpec(
    take_integer("channels", 1, max(shape)),
    take_axes("in_axis"),
    take_axes("out_axis"),
  )
  every = {axis % rank for axis in (*spec.in_axes, *spec.out_axes)}
  once = len(every) == len(spec.in_axes) + len(spec.out_axes)
  take("out_axis", once, "other axes than in_axis, each once,")
  take_name("coding", (CODING,))
  layer = Layer(
    tuple(shape),
    spec,
    take_integer("num_codes", 2, MAX_CODES),
    take_name("codebook", storages.CHOICES["codebook"]),
    TYPES[take_name("dtype", tuple(TYPES))],
    take_integer("exponent", -1100, 1017),
  )
  blocked = shape[spec.in_axes[-1]] if spec.in_axes else 1
  take("channels", blocked % spec.channels == 0, f"a divisor of {blocked}")
  return layer


def check_names(
  where: str, fields: Mapping[str, Any], names: tuple[str, ...]
) -> None:
  """Refuses missing and unknown fields.

  Raises:
    InputError: names them.
  """
  missing = sorted(set(names) - fields.keys())
  unknown = sorted(fields.keys() - set(names))
  if missing or unknown:
    raise errors.InputError(
      f"{where} has no field {missing[0]!r}"
      if missing
      else f"{where} has a field {unknown[0][:40]!r}, which is not known"
    )


def check(valid: bool, field: str, value: Any, expected: str) -> None:
  """Refuses the value of a field unless it is valid.

  Raises:
    InputError: names the field, the value and what is expected.
  """
  if not valid:
    raise errors.InputError(
      f"{field} is {reprlib.repr(value)} where {expected} is expected"
    )


def pack(
  path: str, node: vq_array.VQArray, storage: storages.Storage
) -> tuple[Layer, np.ndarray, np.ndarray]:
  """Packs a kernel.

  Returns:
    What the header says of it, its codes (uint8) and codebook [K, D] in the
    type of the storage.

  Raises:
    InputError: the codebook is stacked, not of finite floats, or not of 2 to
      65,536 codewords; codes and shapes do not fit each other; or the codebook
      spans more than int8 holds.
  """
  trees.check_arrays(path, node)
  codebook, codes = np.asarray(node.codebook), np.asarray(node.codes)
  if codebook.ndim != 2:
    raise errors.InputError(
      f"{path} has a codebook of shape {codebook.shape}, but a packed file "
      "holds no stacked layers; give each layer a VQArray of its own, or the "
      "dense kernel that pqf_jax.decode_params(variables) returns"
    )
  num_codes, length = codebook.shape
  layer = Layer(
    node.kernel_shape, node.spec, num_codes, storage.codebook, codebook.dtype, 0
  )
  layer = from_fields(path, to_fields(layer))  # whatever cannot be read back
  shape = layer.shape
  if node.spec.layout(shape) != (*codes.shape, length):
    raise errors.InputError(
      f"{path} of shape {shape} has codes of shape {codes.shape} and codewords "
      f"of {length} numbers, but {node.spec} needs {node.spec.layout(shape)}"
    )
  integers = np.issubdtype(codes.dtype, np.integer)
  if not integers or codes.min() < 0 or codes.max() >= num_codes:
    raise errors.InputError(
      f"{path} has codes of {codes.dtype} from {codes.min()} to {codes.max()}; "
      f"its {num_codes} codewords need integers from 0 to {num_codes - 1}"
    )
  trees.check_finite(path, codebook)
  scaled = scaling.scale(codebook, storage.codebook)
  if storage.codebook == "int8":
    _check_loss(path, codes, codebook, scaled)
  layer = layer._replace(exponent=scaled.exponent)
  packed = bits.pack_codes(codes, num_codes)
  check_values(path, layer, packed, scaled.numbers)
  return layer, packed, scaled.numbers


def _check_loss(
  path: str, codes: np.ndarray, codebook: np.ndarray, scaled: scaling.Scaled
) -> None:
  """Refuses a codebook of which int8 would keep little."""
  flat = codes.reshape(-1)
  parts = np.array_split(flat, -(-flat.size >> 16))
  uses = sum(np.bincount(part, minlength=len(codebook)) for part in parts)
  exact = np.ldexp(codebook.astype(np.float64), -scaled.exponent)
  lost = uses @ np.square(exact - scaled.numbers).sum(1)
  energy = uses @ np.square(exact).sum(1)
  if lost > _MOST_LOST * energy:
    raise errors.InputError(
      f"{path} has a codebook of which int8 would lose {lost / energy:.1%}, "
      f"because its largest number is {np.abs(codebook).max():g}; pack with "
      "Storage(codebook='float16')"
    )


def unpack(
  layer: Layer, codes: np.ndarray, codebook: np.ndarray
) -> vq_array.VQArray:
  """Unpacks a kernel; undoes `pack`."""
  c_out, m, length = layer.spec.layout(layer.shape)
  indices = bits.unpack_codes(codes, layer.num_codes, c_out * m)
  return vq_array.VQArray(
    _scaled(layer, codebook).restore().reshape(layer.num_codes, length),
    indices.reshape(c_out, m),
    layer.shape,
    layer.spec,
  )


def check_values(
  path: str, layer: Layer, codes: np.ndarray, codebook: np.ndarray
) -> None:
  """Refuses codes without a codeword, and codebooks that are not finite.

  Raises:
    InputError: names the kernel.
  """
  c_out, m, _ = layer.spec.layout(layer.shape)
  num_bits = plans.code_bits(layer.num_codes)
  unused = -c_out * m * num_bits % 8
  if unused and codes[-1] >> (8 - unused):
    raise errors.InputError(f"the codes of {path} have bits after the last")
  if layer.num_codes < 1 << num_bits:
    last = int(bits.unpack_codes(codes, layer.num_codes, c_out * m).max())
    check(
      last < layer.num_codes,
      f"a code of {path}",
      last,
      f"a number below {layer.num_codes}",
    )
  if not _scaled(layer, codebook).is_finite():
    raise errors.InputError(
      f"the codebook of {path} is not finite in {layer.dtype}"
    )


def _scaled(layer: Layer, codebook: np.ndarray) -> scaling.Scaled:
  return scaling.Scaled(codebook, layer.exponent, layer.dtype)

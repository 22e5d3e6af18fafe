"""Compressed kernels: what the header says of each, and their buffers.

A codebook is float16 or int8 times a power of two, see `scaling`.
"""

import dataclasses
import math
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
    shape: dense shape of one layer.
    spec: the layout of its sub-vectors.
    num_codes: K, of each codebook.
    codebook: type of the codebook in the file, see `Storage`.
    dtype: type of the codebook in memory.
    exponent: the codebook is 2^exponent times what is stored.
    stack: how many layers are stacked along each of `spec.stack_axes`.
  """

  shape: tuple[int, ...]
  spec: blocks.BlockSpec
  num_codes: int
  codebook: str
  dtype: np.dtype[Any]
  exponent: int
  stack: tuple[int, ...] = ()

  @property
  def codes_shape(self) -> tuple[int, ...]:
    """Returns the shape of its codes."""
    return self._stacked(*self.spec.layout(self.shape)[:2])

  @property
  def codebook_shape(self) -> tuple[int, ...]:
    """Returns the shape of its codebook."""
    return self._stacked(self.num_codes, self.spec.layout(self.shape)[2])

  def _stacked(self, *shape: int) -> tuple[int, ...]:
    start, *_ = (*self.spec.stack_axes, 0)
    return shape[:start] + self.stack + shape[start:]

  def apart(self, array: np.ndarray) -> np.ndarray:
    """Returns its codes or codebook with the stacked layers as the first axis.

    Args:
      array: of `codes_shape` or `codebook_shape`.

    Returns:
      [S, C_out, M] or [S, K, D], where S layers are stacked; S is 1 for others.
    """
    axes = self.spec.stack_axes
    moved = np.moveaxis(array, axes, range(len(axes)))
    return moved.reshape(-1, *moved.shape[len(axes) :])

  @property
  def code_bytes(self) -> int:
    """Returns the bytes of its codes."""
    return plans.code_bytes(math.prod(self.codes_shape), self.num_codes)

  @property
  def codebook_size(self) -> int:
    """Returns the numbers of its codebook, K * D for each layer of a stack."""
    return math.prod(self.codebook_shape)


FIELDS = (
  *("shape", "channels", "in_axis", "out_axis", "num_codes"),
  *("codebook", "dtype", "exponent", "coding"),
)
# [axis, size, ...] of the axes of stacked layers; only stacks have the field.
STACK = "stack"


def to_fields(layer: Layer) -> dict[str, Any]:
  """Returns the fields of a layer in the header."""
  stack = [layer.spec.stack_axes[0], *layer.stack] if layer.stack else []
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
  } | ({STACK: list(map(_plain, stack))} if stack else {})


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
  fields = {STACK: []} | dict(fields)
  check_names(where, fields, (*FIELDS, STACK))

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
  stack = fields[STACK]
  whole = isinstance(stack, list) and all(
    type(n) is int and 0 <= n < 1 << 40 for n in stack
  )
  sound = whole and (
    not stack
    or (stack[0] <= blocks.LAST_STACK_AXIS and 0 < len(stack) - 1 <= 32 - rank)
  )
  sound = sound and 0 not in stack[1:]
  take(STACK, sound, "an axis from 0 to 2, and positive sizes")
  start, *sizes_of_stack = stack or [0]
  spec = blocks.BlockSpec(
    take_integer("channels", 1, max(shape)),
    take_axes("in_axis"),
    take_axes("out_axis"),
    tuple(range(start, start + len(sizes_of_stack))),
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
    tuple(sizes_of_stack),
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
    What the header says of it, its codes (uint8) and codebook in the type of
    the storage; those of stacked layers in the order of the leaves.

  Raises:
    InputError: the codebook is not of finite floats, or not of 2 to 65,536
      codewords; codes and shapes do not fit each other; or the codebook spans
      more than int8 holds.
  """
  trees.check_arrays(path, node)
  codebook, codes = np.asarray(node.codebook), np.asarray(node.codes)
  if codebook.ndim < 2:
    raise errors.InputError(
      f"{path} has a codebook of shape {codebook.shape}; give [K, D], and the "
      "axes of stacked layers"
    )
  axes = node.stack_axes
  others = [n for dim, n in enumerate(codebook.shape) if dim not in axes]
  layer = Layer(
    node.kernel_shape,
    dataclasses.replace(node.spec, stack_axes=axes),
    others[0],
    storage.codebook,
    codebook.dtype,
    0,
    tuple(codebook.shape[axis] for axis in axes),
  )
  layer = from_fields(path, to_fields(layer))  # whatever cannot be read back
  num_codes, needed = layer.num_codes, (layer.codebook_shape, layer.codes_shape)
  if (codebook.shape, codes.shape) != needed:
    raise errors.InputError(
      f"{path} of shape {node.shape} has a codebook of shape {codebook.shape} "
      f"and codes of shape {codes.shape}, but {layer.spec} needs {needed[0]} "
      f"and {needed[1]}"
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
    _check_losses(path, layer, codes, codebook, scaled)
  layer = layer._replace(exponent=scaled.exponent)
  packed = bits.pack_codes(codes, num_codes)
  check_values(path, layer, packed, scaled.numbers)
  return layer, packed, scaled.numbers


def _check_losses(
  path: str,
  layer: Layer,
  codes: np.ndarray,
  codebook: np.ndarray,
  scaled: scaling.Scaled,
) -> None:
  """Refuses a codebook, of any layer of a stack, that int8 would hurt."""
  parts = [layer.apart(x) for x in (codes, codebook, scaled.numbers)]
  for part_codes, part, numbers_of_part in zip(*parts, strict=True):
    rounded = scaled._replace(numbers=numbers_of_part)
    _check_loss(path, part_codes, part, rounded)


def _check_loss(
  path: str, codes: np.ndarray, codebook: np.ndarray, scaled: scaling.Scaled
) -> None:
  """Refuses a codebook of which int8 would keep little."""
  uses = bits.count_codes(codes, len(codebook))
  exact = np.ldexp(codebook.astype(np.float64), -scaled.exponent)
  lost = uses @ np.square(exact - scaled.numbers).sum(1)
  energy = uses @ np.square(exact).sum(1)
  if lost > _MOST_LOST * energy:
    raise errors.InputError(
      f"{path} has a codebook of which int8 would lose {lost / energy:.1%}, "
      f"because its largest number is {np.abs(codebook).max():g}; keep "
      "float16: Storage(codebook='float16'), --config.storage.codebook=float16"
    )


def unpack(
  layer: Layer, codes: np.ndarray, codebook: np.ndarray
) -> vq_array.VQArray:
  """Unpacks a kernel; undoes `pack`."""
  count = math.prod(layer.codes_shape)
  indices = bits.unpack_codes(codes, layer.num_codes, count)
  return vq_array.VQArray(
    _scaled(layer, codebook).restore().reshape(layer.codebook_shape),
    indices.reshape(layer.codes_shape),
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
  count = math.prod(layer.codes_shape)
  num_bits = plans.code_bits(layer.num_codes)
  unused = -count * num_bits % 8
  if unused and codes[-1] >> (8 - unused):
    raise errors.InputError(f"the codes of {path} have bits after the last")
  if layer.num_codes < 1 << num_bits:
    last = int(bits.unpack_codes(codes, layer.num_codes, count).max())
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

"""Products of activations with a kernel that stays codebook and codes.

Axis letters: B rows of activations, C_in = M * D input channels, C_out output
channels, K codewords of length D. The codes lie position by position, [M,
C_out], so that a loop over the M positions reads them in order.

Both forms loop over groups of positions and never hold the kernel:

- tables: each sub-vector of the input is multiplied by all codewords once,
  K * D * M multiplications a row; then each output adds up the M entries that
  its codes name. Of the weights only the codes are read.
- blocks: the weights of a group are decoded, and multiplied as dense ones.

NVIDIA Hopper and later has a kernel for few rows (`hopper`), and decodes a
kernel as a whole for more.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pqf_jax import errors, nvidia
from pqf_jax.core import trees

# The most numbers that tables may hold to serve better than blocks, on a CPU;
# docs/inference.md has the measured times.
_MOST_TABLES = 2**21

# Entries that a step of each loop adds or decodes: enough for XLA to share them
# among the cores, and few enough for their caches.
_TABLE_ENTRIES = 2**17
_BLOCK_ENTRIES = 2**20


def product(
  inputs: jax.Array,
  codebook: trees.Array,
  codes: trees.Array,
  *,
  crossover: int | None = None,
  precision: lax.PrecisionLike = None,
  weight_dtype: jax.typing.DTypeLike | None = None,
  dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
  """Returns `inputs @ kernel`, [B, C_out], summed in float32 (or float64).

  Args:
    inputs: [B, C_in] float.
    codebook: [K, D] float.
    codes: [M, C_out] integer below K: `kernel[m * D : m * D + D, o]` is
      `codebook[codes[m, o]]`.
    crossover: up to so many rows are multiplied by tables, more by blocks; by
      default up to D rows, unless the tables grow too large for the caches.
      Where there is a kernel, up to so many rows go by it, if it can.
    precision: of the products, as of `jnp.dot`.
    weight_dtype: what the codewords are rounded to first; None: as they are.
    dtype: of the result; None: that of the sums.

  Raises:
    InputError: the codebook and codes are of another number of inputs, or the
      inputs are complex.
  """
  (num_positions, c_out), length = codes.shape, codebook.shape[1]
  if inputs.shape[1] != num_positions * length:
    raise errors.InputError(
      f"inputs have shape {inputs.shape}, but codes of shape {codes.shape} and "
      f"codewords of length {length} make a kernel of {num_positions * length} "
      "inputs; give inputs [rows, M * D] and codes [M, C_out]"
    )
  if jnp.iscomplexobj(inputs):
    raise errors.InputError(
      f"inputs are of type {inputs.dtype}; multiply inputs.real and inputs.imag"
    )
  weight_dtype = jnp.dtype(weight_dtype or codebook.dtype)
  is_wide = jnp.float64 in (inputs.dtype, weight_dtype)
  sum_dtype = jnp.float64 if is_wide else jnp.float32
  dtype = jnp.dtype(dtype or sum_dtype)
  if not inputs.shape[0]:
    return jnp.zeros((0, c_out), dtype)
  most_rows = most_by_tables(codebook, codes, crossover)
  form = _by_tables if inputs.shape[0] <= most_rows else _by_blocks

  def plain(
    inputs: jax.Array, codebook: jax.Array, codes: jax.Array
  ) -> jax.Array:
    weights = codebook.astype(weight_dtype).astype(sum_dtype)
    sums = form(inputs.astype(sum_dtype), weights, codes, precision)
    return sums.astype(dtype)

  operands = inputs, jnp.asarray(codebook), jnp.asarray(codes)
  if not nvidia.is_available():
    return plain(*operands)
  # Importing it takes 0.25 s, for which others have no use.
  from pqf_jax.inference import hopper

  decoded = functools.partial(
    _decoded,
    precision=precision,
    weight_dtype=weight_dtype,
    sum_dtype=sum_dtype,
  )
  by_xla = functools.partial(
    lax.platform_dependent,
    cuda=lambda *operands: decoded(*operands).astype(dtype),
    default=plain,
  )
  is_bfloat16 = weight_dtype == jnp.bfloat16
  is_few = crossover is None or inputs.shape[0] <= crossover
  plan = hopper.make_plan(*operands, dtype) if is_bfloat16 and is_few else None
  if plan is None:
    return by_xla(*operands)
  kernel = functools.partial(hopper.product, dtype=dtype, plan=plan)
  return _with_gradient(
    functools.partial(lax.platform_dependent, cuda=kernel, default=plain),
    by_xla,
  )(*operands)


def _decoded(
  inputs: jax.Array,
  codebook: jax.Array,
  codes: jax.Array,
  *,
  precision: lax.PrecisionLike,
  weight_dtype: jnp.dtype,
  sum_dtype: jax.typing.DTypeLike,
) -> jax.Array:
  """Decodes the kernel once the inputs are there, and multiplies by it."""
  inputs, codes = lax.optimization_barrier((inputs, codes))
  weights = jnp.take(codebook.astype(weight_dtype), codes, axis=0, mode="clip")
  kernel = weights.transpose(0, 2, 1).reshape(-1, codes.shape[1])
  both = weight_dtype if inputs.dtype == weight_dtype else sum_dtype
  return lax.dot_general(
    inputs.astype(both),
    kernel.astype(both),
    (((1,), (0,)), ((), ())),
    precision=precision,
    preferred_element_type=sum_dtype,
  )


def _with_gradient(
  function: Callable[..., jax.Array], like: Callable[..., jax.Array]
) -> Callable[..., jax.Array]:
  """Returns a function whose gradient is that of another, equal one."""
  derived = jax.custom_jvp(function)
  derived.defjvp(functools.partial(jax.jvp, like))
  return derived


def most_by_tables(
  codebook: trees.Array, codes: trees.Array, crossover: int | None
) -> int:
  """Returns the most rows that `product` multiplies by tables."""
  if crossover is not None:
    return crossover
  num_codes, length = codebook.shape
  return min(length, _MOST_TABLES // (codes.shape[0] * num_codes))


def _by_tables(
  inputs: jax.Array,
  codebook: jax.Array,
  codes: jax.Array,
  precision: lax.PrecisionLike,
) -> jax.Array:
  (num_rows, _), (num_codes, length) = inputs.shape, codebook.shape
  num_positions, c_out = codes.shape
  vectors = inputs.reshape(num_rows * num_positions, length)
  tables = jnp.matmul(vectors, codebook.T, precision=precision)
  pairs = _to_pairs(tables.reshape(num_rows, -1))
  num_pairs = len(pairs)
  size = _group_size(num_positions, num_pairs * c_out, _TABLE_ENTRIES)
  tables = jnp.moveaxis(pairs.reshape(num_pairs, -1, size, num_codes), 0, 2)

  def add(
    sums: jax.Array, group: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, None]:
    return sums + _pick(*group), None

  sums, _ = lax.scan(
    add,
    jnp.zeros((size * num_pairs, c_out), pairs.dtype),
    (
      tables.reshape(-1, size * num_pairs, num_codes),
      codes.reshape(-1, size, c_out),
    ),
  )
  return _add_up(sums.reshape(size, num_pairs, c_out))[:num_rows]


def _by_blocks(
  inputs: jax.Array,
  codebook: jax.Array,
  codes: jax.Array,
  precision: lax.PrecisionLike,
) -> jax.Array:
  num_rows, length = inputs.shape[0], codebook.shape[1]
  num_positions, c_out = codes.shape
  # Several steps also of small kernels: the block of a single one would not
  # depend on the inputs, and be decoded together with those of all layers.
  entries = min(_BLOCK_ENTRIES, codes.size * length // 4)
  size = _group_size(num_positions, length * c_out, entries)
  columns = jnp.tile(codebook.T, (size, 1))

  def add(
    sums: jax.Array, group: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, None]:
    inputs, codes = group
    block = _pick(columns, codes)
    return sums + jnp.matmul(inputs, block, precision=precision), None

  sums, _ = lax.scan(
    add,
    jnp.zeros((num_rows, c_out), inputs.dtype),
    (
      jnp.moveaxis(inputs.reshape(num_rows, -1, size * length), 1, 0),
      codes.reshape(-1, size, c_out),
    ),
  )
  return sums


def _pick(tables: jax.Array, codes: jax.Array) -> jax.Array:
  """Returns the entries that codes name, [n * r, C_out].

  XLA's loops over two axes are faster than those over three.

  Args:
    tables: [n * r, K], r for each row of codes.
    codes: [n, C_out].
  """
  codes = jnp.repeat(codes, len(tables) // len(codes), axis=0)
  return jnp.take_along_axis(
    tables, codes.astype(jnp.int32), -1, mode="promise_in_bounds"
  )


def _group_size(num_positions: int, entries: int, target: int) -> int:
  """Returns the positions of a step: the most that divide M, up to a target."""
  most = max(1, min(num_positions, target // entries))
  return next(n for n in range(most, 0, -1) if num_positions % n == 0)


def _to_pairs(rows: jax.Array) -> jax.Array:
  """Joins two rows as one of complex numbers: one gather serves both."""
  if len(rows) == 1:
    return rows
  rows = jnp.pad(rows, ((0, len(rows) % 2), (0, 0)))
  return lax.complex(rows[0::2], rows[1::2])


def _add_up(pairs: jax.Array) -> jax.Array:
  """Returns the rows of pairs [size, P, C_out], summed over the first axis."""
  parts = (pairs.real, pairs.imag) if jnp.iscomplexobj(pairs) else (pairs,)
  # As a product: XLA's sums over a first axis are slower. Of real numbers, so
  # that an infinity stays in its row.
  ones = jnp.ones(len(pairs), parts[0].dtype)
  sums = [
    jnp.tensordot(ones, part, 1, precision=lax.Precision.HIGHEST)
    for part in parts
  ]
  return jnp.stack(sums, axis=1).reshape(-1, pairs.shape[-1])

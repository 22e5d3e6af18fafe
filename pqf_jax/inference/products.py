"""Products of activations with a kernel that stays codebook and codes.

Axis letters: B rows of activations, C_in = M * D input channels, C_out output
channels, K codewords of length D. The codes are joined: 32 bits hold those that
an output has at several positions, side by side, [N, C_out], so that a loop
over the N reads them in order, and one read brings several.

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
from pqf_jax.core import trees, vq_array
from pqf_jax.inference import order

# The most numbers that tables may hold to serve better than blocks, on a CPU;
# docs/inference.md has the measured times.
_MOST_TABLES = 2**21

# Sums that a step of each loop adds to, and entries that it decodes: enough for
# XLA to share them among the cores, and few enough for their caches.
_TABLE_SUMS = 2**17
_BLOCK_ENTRIES = 2**20

_Group = tuple[jax.Array, jax.Array]


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

  The codes are joined at each call, which costs about a reading of them;
  `make_apply` joins those of a network once.

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
  num_positions, length = codes.shape[0], codebook.shape[1]
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
  return product_of_joined(
    inputs,
    codebook,
    join_codes(codes, codebook.shape[0]),
    crossover=crossover,
    precision=precision,
    weight_dtype=weight_dtype,
    dtype=dtype,
  )


def product_of_joined(
  inputs: jax.Array,
  codebook: trees.Array,
  joined: trees.Array,
  *,
  crossover: int | None = None,
  precision: lax.PrecisionLike = None,
  weight_dtype: jax.typing.DTypeLike | None = None,
  dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
  """Returns `product` with the codes as `join_codes` returns them."""
  num_rows, c_in = inputs.shape
  weight_dtype = jnp.dtype(weight_dtype or codebook.dtype)
  is_wide = jnp.float64 in (inputs.dtype, weight_dtype)
  sum_dtype = jnp.float64 if is_wide else jnp.float32
  dtype = jnp.dtype(dtype or sum_dtype)
  if not num_rows:
    return jnp.zeros((0, joined.shape[1]), dtype)
  most_rows = most_by_tables(codebook, c_in // codebook.shape[1], crossover)
  form = _by_tables if num_rows <= most_rows else _by_blocks

  def plain(
    inputs: jax.Array, codebook: jax.Array, joined: jax.Array
  ) -> jax.Array:
    weights = codebook.astype(weight_dtype).astype(sum_dtype)
    sums = form(inputs.astype(sum_dtype), weights, joined, precision)
    return sums.astype(dtype)

  operands = inputs, jnp.asarray(codebook), jnp.asarray(joined)
  if not nvidia.is_available():
    return plain(*operands)
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
  run = _kernel(*operands, crossover, weight_dtype, dtype)
  if run is None:
    return by_xla(*operands)
  return _with_gradient(
    functools.partial(lax.platform_dependent, cuda=run, default=plain), by_xla
  )(*operands)


def has_kernel(
  inputs: jax.Array,
  codebook: trees.Array,
  joined: trees.Array,
  *,
  crossover: int | None = None,
  weight_dtype: jax.typing.DTypeLike | None = None,
  dtype: jax.typing.DTypeLike,
) -> bool:
  """Returns whether this process has a GPU with a kernel for such a product.

  The arguments are those of `product_of_joined`.
  """
  weight_dtype = jnp.dtype(weight_dtype or codebook.dtype)
  return nvidia.is_available() and bool(
    _kernel(inputs, codebook, joined, crossover, weight_dtype, dtype)
  )


def _kernel(
  inputs: jax.Array,
  codebook: trees.Array,
  joined: trees.Array,
  crossover: int | None,
  weight_dtype: jnp.dtype,
  dtype: jax.typing.DTypeLike,
) -> Callable[..., jax.Array] | None:
  """Returns Hopper's kernel for these operands, or None if it cannot serve."""
  # Importing it takes 0.25 s, for which others have no use.
  from pqf_jax.inference import hopper

  is_few = crossover is None or len(inputs) <= crossover
  if weight_dtype != jnp.bfloat16 or not is_few:
    return None
  plan = hopper.make_plan(inputs, codebook, joined, dtype)
  if plan is None:
    return None
  return functools.partial(hopper.product, dtype=dtype, plan=plan)


def _decoded(
  inputs: jax.Array,
  codebook: jax.Array,
  joined: jax.Array,
  *,
  precision: lax.PrecisionLike,
  weight_dtype: jnp.dtype,
  sum_dtype: jax.typing.DTypeLike,
) -> jax.Array:
  """Decodes the kernel once the inputs are there, and multiplies by it."""
  inputs, joined = lax.optimization_barrier((inputs, joined))
  num_codes, length = codebook.shape
  codes = split_codes(joined, num_codes, inputs.shape[1] // length)
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
  codebook: trees.Array, num_positions: int, crossover: int | None
) -> int:
  """Returns the most rows that `product` multiplies by tables."""
  if crossover is not None:
    return crossover
  num_codes, length = codebook.shape
  return min(length, _MOST_TABLES // (num_positions * num_codes))


@functools.partial(jax.jit, static_argnames=("num_codes", "axis"))
def join_codes(codes: trees.Array, num_codes: int, axis: int = 0) -> jax.Array:
  """Returns codes side by side in 32 bits, as many as fit: [N, C_out] uint32.

  Args:
    codes: [M, C_out] integer below K, or with more axes.
    num_codes: K.
    axis: that of M, or N.
  """
  each = _codes_side_by_side(num_codes)
  codes = jnp.asarray(codes, jnp.uint32)
  ends = [(0, 0)] * codes.ndim
  ends[axis] = (0, -codes.shape[axis] % each)
  codes = jnp.pad(codes, ends)
  groups = codes.reshape(
    *codes.shape[:axis], -1, each, *codes.shape[axis + 1 :]
  )
  parts = jnp.unstack(groups, axis=axis + 1)
  return sum(
    (part << (32 // each * i) for i, part in enumerate(parts[1:], 1)), parts[0]
  )


def split_codes(
  joined: trees.Array, num_codes: int, num_positions: int, axis: int = 0
) -> jax.Array:
  """Returns the codes [M, C_out] of `join_codes`, in their smallest type."""
  each = _codes_side_by_side(num_codes)
  shape = joined.shape
  places = lax.broadcasted_iota(
    jnp.int32, (*shape[: axis + 1], each, *shape[axis + 1 :]), axis + 1
  )
  codes = _code_at(places, jnp.expand_dims(joined, axis + 1), each)
  codes = codes.astype(vq_array.code_dtype(num_codes))
  codes = codes.reshape(*shape[:axis], -1, *shape[axis + 1 :])
  return lax.slice_in_dim(codes, 0, num_positions, axis=axis)


def _codes_side_by_side(num_codes: int) -> int:
  return 4 // vq_array.code_dtype(num_codes).itemsize


def _code_at(
  places: jax.Array | int, joined: jax.Array, each: int
) -> jax.Array:
  """Returns the codes that lie at these places of their 32 bits."""
  bits = 32 // each
  shifts = jnp.asarray(bits * places, jnp.uint32)
  return (joined >> shifts) & jnp.uint32(2**bits - 1)


def _by_tables(
  inputs: jax.Array,
  codebook: jax.Array,
  joined: jax.Array,
  precision: lax.PrecisionLike,
) -> jax.Array:
  (num_rows, c_in), (num_codes, length) = inputs.shape, codebook.shape
  num_joined, c_out = joined.shape
  each = _codes_side_by_side(num_codes)
  size = _group_size(num_joined, num_rows * c_out, _TABLE_SUMS)
  # The last 32 bits may hold positions that the kernel lacks.
  inputs = jnp.pad(inputs, ((0, 0), (0, num_joined * each * length - c_in)))
  # Inputs are put in the order of the loop, since tables are larger.
  vectors = inputs.reshape(num_rows, -1, size, each, length)
  vectors = vectors.transpose(1, 3, 2, 0, 4).reshape(-1, length)
  tables = jnp.matmul(vectors, codebook.T, precision=precision)

  def add(sums: jax.Array, group: _Group) -> tuple[jax.Array, None]:
    tables, joined = group
    picked = (_pick(tables[i], _code_at(i, joined, each)) for i in range(each))
    return sum(picked, sums), None

  sums, _ = lax.scan(
    add,
    _sums((size * num_rows, c_out), inputs, joined),
    (
      tables.reshape(-1, each, size * num_rows, num_codes),
      joined.reshape(-1, size, c_out),
    ),
  )
  # As a product: XLA's sums over a first axis are slower.
  sums = sums.reshape(size, num_rows, c_out)
  return jnp.tensordot(
    jnp.ones(size, sums.dtype), sums, 1, precision=lax.Precision.HIGHEST
  )


def _by_blocks(
  inputs: jax.Array,
  codebook: jax.Array,
  joined: jax.Array,
  precision: lax.PrecisionLike,
) -> jax.Array:
  (num_rows, c_in), (num_codes, length) = inputs.shape, codebook.shape
  # Without the zero they would be split for all layers at once.
  joined = joined + order.zero_after(inputs, joined)
  codes = split_codes(joined, num_codes, c_in // length)
  num_positions, c_out = codes.shape
  size = _group_size(num_positions, length * c_out, _BLOCK_ENTRIES)
  columns = jnp.tile(codebook.T, (size, 1))

  def add(sums: jax.Array, group: _Group) -> tuple[jax.Array, None]:
    inputs, codes = group
    block = _pick(columns, codes)
    return sums + jnp.matmul(inputs, block, precision=precision), None

  sums, _ = lax.scan(
    add,
    _sums((num_rows, c_out), inputs, joined),
    (
      jnp.moveaxis(inputs.reshape(num_rows, -1, size * length), 1, 0),
      codes.reshape(-1, size, c_out),
    ),
  )
  return sums


def _sums(
  shape: tuple[int, int], inputs: jax.Array, joined: jax.Array
) -> jax.Array:
  """Returns zeros that take no memory before the inputs are computed."""
  return jnp.full(shape, order.zero_after(inputs, joined), inputs.dtype)


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


def _group_size(num_rows: int, entries: int, target: int) -> int:
  """Returns the rows of a step: the most that divide all, up to a target."""
  most = max(1, min(num_rows, target // entries))
  return next(n for n in range(most, 0, -1) if num_rows % n == 0)

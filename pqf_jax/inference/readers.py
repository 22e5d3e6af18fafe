"""Equations that read a kernel straight from its codes."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pqf_jax.discovery import tracing
from pqf_jax.inference import kernels, products


def matrix_product(
  eqn: tracing.Equation, operands: list[Any], crossover: int | None
) -> jax.Array | None:
  """Returns the result of a `dot_general` of activations and a kernel, or None.

  None: it contracts other axes than the kernel's inputs, has batch axes, is of
  other numbers than floats, or the kernel's dense form is faster.
  """
  (place,) = (i for i, x in enumerate(operands) if kernels.is_kernel(x))
  kernel, inputs = operands[place], operands[1 - place]
  contracted, batch = eqn.params["dimension_numbers"]
  summed = dict(zip(contracted[place], contracted[1 - place], strict=True))
  if any(map(len, batch)) or not kernel.is_matrix or not kernel.joined:
    return None
  if not _are_floats(inputs, kernel.weights):
    return None
  if set(summed) != set(kernel.in_axes):
    return None
  axes = [summed[axis] for axis in kernel.in_axes]
  rows = jnp.moveaxis(inputs, axes, range(-len(axes), 0))
  outputs = _multiply(eqn, rows, kernel, crossover)
  if outputs is None:
    return None
  # The kernel's axes come in their own order, before or after those of rows.
  num_free = inputs.ndim - len(axes)
  order = sorted(range(len(kernel.out_axes)), key=kernel.out_axes.__getitem__)
  of_kernel, of_rows = [num_free + i for i in order], list(range(num_free))
  return outputs.transpose(
    of_rows + of_kernel if place else of_kernel + of_rows
  )


def convolution(
  eqn: tracing.Equation, operands: list[Any], crossover: int | None
) -> jax.Array | None:
  """Returns the result of a convolution that is a product, or None.

  None: the kernel has taps or groups, the inputs are padded, dilated or no
  floats, or they have more positions than tables serve: then XLA's convolution
  is faster than a product by blocks.
  """
  inputs, kernel = operands
  if not kernels.is_kernel(kernel) or kernels.is_kernel(inputs):
    return None
  params, numbers = eqn.params, eqn.params["dimension_numbers"]
  out_axis, in_axis, *spatial = numbers.rhs_spec
  is_pointwise = (
    kernel.joined
    and _are_floats(inputs, kernel.weights)
    and (in_axis,) == kernel.in_axes
    and (out_axis,) == kernel.out_axes
    and all(kernel.layer_shape[axis] == 1 for axis in spatial)
    and params["feature_group_count"] == params["batch_group_count"] == 1
    and not any(map(any, params["padding"]))
    and set(params["lhs_dilation"]) <= {1}
  )
  if not is_pointwise:
    return None
  images = inputs.transpose(numbers.lhs_spec)  # [images, channels, ...]
  strides = tuple(slice(None, None, s) for s in params["window_strides"])
  rows = jnp.moveaxis(images[(..., *strides)], 1, -1)
  num_positions = rows.shape[-1] // kernel.codebook.shape[1]
  most_rows = products.most_by_tables(kernel.codebook, num_positions, crossover)
  if math.prod(rows.shape[:-1]) > most_rows:
    return None
  outputs = _multiply(eqn, rows, kernel, crossover)
  if outputs is None:
    return None
  outputs = jnp.moveaxis(outputs, -1, 1)
  place = [numbers.out_spec.index(axis) for axis in range(outputs.ndim)]
  return outputs.transpose(place)


def rows_of_table(
  eqn: tracing.Equation, operands: list[Any], crossover: int | None
) -> jax.Array | None:
  """Returns the rows that a gather takes of an embedding, or None.

  None: it gathers something else than whole rows along the output axis, or
  there is a dense form of the kernel.
  """
  del crossover
  table, indices = operands
  if not kernels.is_kernel(table) or not table.is_matrix:
    return None
  if table.dense is not None:
    return None
  params, numbers = eqn.params, eqn.params["dimension_numbers"]
  (num_rows, width), rank = table.layer_shape, indices.ndim - 1
  is_rows = (
    table.out_axes == (0,)
    and numbers.start_index_map == numbers.collapsed_slice_dims == (0,)
    and not numbers.operand_batching_dims
    and numbers.offset_dims == (rank,)
    and tuple(params["slice_sizes"]) == (1, width)
  )
  if not is_rows:
    return None
  chosen = indices[..., 0]
  if table.joined:
    codes = jnp.take(table.codes, chosen, axis=1, mode="clip")
    (num_codes, length) = table.codebook.shape
    codes = products.split_codes(codes, num_codes, width // length)
    codes = jnp.moveaxis(codes, 0, -1)
  else:
    codes = jnp.take(table.codes, chosen, axis=0, mode="clip")
  vectors = jnp.take(table.weights, codes, axis=0)
  rows = vectors.reshape(*chosen.shape, width)
  if params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
    return rows
  fill = jnp.nan if params["fill_value"] is None else params["fill_value"]
  inside = (chosen >= 0) & (chosen < num_rows)
  return jnp.where(inside[..., None], rows, jnp.asarray(fill, rows.dtype))


READERS = {
  "dot_general": matrix_product,
  "conv_general_dilated": convolution,
  "gather": rows_of_table,
}
"""By primitive: (equation, operands, crossover) -> result or None."""


def _are_floats(*arrays: Any) -> bool:
  """Returns whether a product of arrays is one that `products` makes.

  Complex numbers have a second part, and large integers more digits than
  float32.
  """
  return all(jnp.issubdtype(array.dtype, jnp.floating) for array in arrays)


def _multiply(
  eqn: tracing.Equation,
  inputs: jax.Array,
  kernel: kernels.Kernel,
  crossover: int | None,
) -> jax.Array | None:
  """Returns rows [..., *in] times a kernel: [..., *out], or None.

  None: the kernel has a dense form too, and that is faster.
  """
  num_free = inputs.ndim - len(kernel.in_axes)
  free, summed = inputs.shape[:num_free], inputs.shape[num_free:]
  shape = [kernel.layer_shape[axis] for axis in kernel.out_axes]
  rows = inputs.reshape(math.prod(free), math.prod(summed))
  operands = rows, kernel.codebook, kernel.codes
  settings: dict[str, Any] = {
    "crossover": crossover,
    "weight_dtype": kernel.dtype,
    "dtype": getattr(eqn.outvars[0].aval, "dtype", inputs.dtype),
  }
  if kernel.dense is not None and not products.has_kernel(
    *operands, **settings
  ):
    return None
  outputs = products.product_of_joined(
    *operands, precision=eqn.params["precision"], **settings
  )
  return outputs.reshape(*free, *shape)

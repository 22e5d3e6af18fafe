"""What every primitive does to the axes of its operands: one table of rules.

A rule states which axes are tied and which are blocked, and returns the axes of
the results. It is sound when whatever it leaves free may be permuted without
changing the program's function. Jaxprs are no stable interface of JAX, so all
that is known of primitives is kept in the modules of rules, `propagation`
(loops and calls) and `tracing`.
"""

from collections.abc import Callable, Collection, Sequence

from pqf_jax.discovery import axis_factors, contraction_rules, layout_rules

Axes = axis_factors.Axes
Equation = axis_factors.Equation
Rule = axis_factors.Rule

ELEMENTWISE = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
cbrt ceil clamp clz complex conj convert_element_type cos cosh digamma div eq
erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igammac imag integer_pow
is_finite le lgamma log log1p log2 logistic lt max min mul mulhi ne neg
nextafter not one_minus_square or polygamma polynomial population_count pow real
reduce_precision rem round rsqrt select_n shift_left shift_right_arithmetic
shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor
"""
PASS_THROUGH = """
copy copy_p device_put layout_constraint name optimization_barrier pvary reshard
sharding_constraint stage
"""
REDUCTIONS = """
reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor
"""
CUMULATIVE = "cumlogsumexp cummax cummin cumprod cumsum"
WINDOWED = "reduce_window reduce_window_max reduce_window_min reduce_window_sum"


def _elementwise(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  (result,) = results = axis_factors.new_results(eqn)
  for operand in operands:
    if operand:  # scalars mix freely with arrays of any rank
      axis_factors.tie_all(result, operand)
  return results


def _pass_through(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  del eqn
  return list(operands)


def _blocking(touched: Callable[[Equation], Collection[int]]) -> Rule:
  """A rule for primitives that mix or cut some axes and leave the others.

  An axis counts as touched as well where its length changes.
  """

  def rule(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    results = axis_factors.new_results(eqn)
    # The rest are scalars: start indices, padding values, initial values.
    arrays = [axes for axes in operands if len(axes) == len(results[0])]
    for dim, row in enumerate(zip(*arrays, *results, strict=True)):
      lengths = {axis_factors.axis_length(axis) for axis in row}
      if len(lengths) > 1 or dim in touched(eqn):
        axis_factors.block_axes(row, eqn.primitive.name)
      else:
        for axis in row:
          axis_factors.tie_axes(row[0], axis)
    return results

  return rule


def _windowed_dims(eqn: Equation) -> list[int]:
  keys = ("window_dimensions", "window_strides", "padding")
  rows = zip(*(eqn.params[key] for key in keys), strict=True)
  return [dim for dim, row in enumerate(rows) if row != (1, 1, (0, 0))]


def _padded_dims(eqn: Equation) -> list[int]:
  rows = enumerate(eqn.params["padding_config"])
  return [dim for dim, row in rows if tuple(row) != (0, 0, 0)]


def _reduce(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  """The order of what is summed up does not matter."""
  return [axis_factors.drop_axes(operands[0], eqn.params["axes"])]


def _arg_reduce(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  picked = [operands[0][dim] for dim in eqn.params["axes"]]
  axis_factors.block_axes(picked, eqn.primitive.name)
  return _reduce(eqn, operands)


def _iota(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  del operands
  (result,) = results = axis_factors.new_results(eqn)
  axis_factors.block_axes([result[eqn.params["dimension"]]], "iota")
  return results


def _gather(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  """Axes that are taken whole pass; everything that is indexed is blocked."""
  (result,) = results = axis_factors.new_results(eqn)
  operand, indices = operands
  dims = eqn.params["dimension_numbers"]
  dropped = {*dims.collapsed_slice_dims, *dims.operand_batching_dims}
  window = [dim for dim in range(len(operand)) if dim not in dropped]
  passed = {
    dim: out
    for dim, out in zip(window, dims.offset_dims, strict=True)
    if dim not in dims.start_index_map
    and eqn.params["slice_sizes"][dim] == axis_factors.axis_length(operand[dim])
  }
  for dim, out in passed.items():
    axis_factors.tie_axes(result[out], operand[dim])
  touched = (
    *axis_factors.drop_axes(operand, passed.keys()),
    *axis_factors.drop_axes(result, passed.values()),
    *indices,
  )
  axis_factors.block_axes(touched, "gather")
  return results


def _last_dim(eqn: Equation) -> int:
  return eqn.outvars[0].aval.ndim - 1


RULES: dict[str, Rule] = {
  **dict.fromkeys(ELEMENTWISE.split(), _elementwise),
  **dict.fromkeys(PASS_THROUGH.split(), _pass_through),
  **dict.fromkeys(REDUCTIONS.split(), _reduce),
  **dict.fromkeys(
    CUMULATIVE.split(), _blocking(lambda eqn: {eqn.params["axis"]})
  ),
  **dict.fromkeys(WINDOWED.split(), _blocking(_windowed_dims)),
  **layout_rules.LAYOUT_RULES,
  "argmax": _arg_reduce,
  "argmin": _arg_reduce,
  "conv_general_dilated": contraction_rules.tie_convolution,
  "dot_general": contraction_rules.tie_dot,
  "dynamic_slice": _blocking(lambda eqn: ()),
  "dynamic_update_slice": _blocking(lambda eqn: ()),
  "gather": _gather,
  "iota": _iota,
  "pad": _blocking(_padded_dims),
  "rev": _blocking(lambda eqn: eqn.params["dimensions"]),
  "sort": _blocking(lambda eqn: {eqn.params["dimension"]}),
  "top_k": _blocking(lambda eqn: {eqn.params.get("axis", _last_dim(eqn))}),
}
"""{primitive: rule}; a primitive that is absent blocks all that it touches."""

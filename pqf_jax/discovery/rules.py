"""Axis rules of JAX primitives: what each one ties, and what it blocks.

A rule states which axes are tied and which are blocked, and returns the axes of
the results. It is sound when every axis that it leaves free may be permuted
without changing the program's function.
"""

import bisect
import itertools
import operator
from collections.abc import Callable, Collection, Sequence

from pqf_jax.discovery import axis_factors, tracing

Axes = axis_factors.Axes
Equation = tracing.Equation
Rule = Callable[[Equation, Sequence[Axes]], list[Axes]]
"""(equation, axes of its operands) -> axes of its results."""

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
ALIGNED = frozenset(
  f"""
  {ELEMENTWISE} {PASS_THROUGH} {REDUCTIONS}
  broadcast_in_dim reshape squeeze transpose
  """.split()
)
"""Primitives that compute each entry of a result from the entries at the same
indices along all axes that the result shares with an operand."""
STRIDED = "strided slice"
WINDOWED = "reduce_window reduce_window_max reduce_window_min reduce_window_sum"


def new_results(eqn: Equation, reason: str = "") -> list[Axes]:
  """Makes new axes for every result of an equation."""
  shapes = map(tracing.shape_of, eqn.outvars)
  return [axis_factors.new_axes(shape, reason) for shape in shapes]


def _elementwise(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  (result,) = results = new_results(eqn)
  for operand in operands:
    if operand:  # scalars mix freely with arrays of any rank
      axis_factors.tie_all(result, operand)
  return results


def _pass_through(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  del eqn
  return list(operands)


def _blocking(touched: Callable[[Equation], Collection[int]]) -> Rule:
  """Makes a rule for primitives that mix or cut some axes and keep others."""

  def rule(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    results = new_results(eqn)
    # The rest are scalars: start indices, padding values, initial values.
    arrays = [axes for axes in operands if len(axes) == len(results[0])]
    for dim, row in enumerate(zip(*arrays, *results, strict=True)):
      lengths = {axis_factors.axis_length(axis) for axis in row}
      # An axis whose length changes counts as touched as well.
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


def _axis_dims(eqn: Equation) -> list[int]:
  return [eqn.params.get("axis", len(tracing.shape_of(eqn.outvars[0])) - 1)]


def _reduce(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  """Drops the reduced axes, which stay free: a sum does not depend on order."""
  return [axis_factors.drop_axes(operands[0], eqn.params["axes"])]


def _arg_reduce(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  picked = [operands[0][dim] for dim in eqn.params["axes"]]
  axis_factors.block_axes(picked, eqn.primitive.name)
  return _reduce(eqn, operands)


def _iota(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  del operands
  (result,) = results = new_results(eqn)
  axis_factors.block_axes([result[eqn.params["dimension"]]], "iota")
  return results


def _gather(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  """Passes axes that are taken whole, and blocks everything that is indexed."""
  (result,) = results = new_results(eqn)
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


def _dot(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  """Ties contracted pairs and batch pairs of axes, and passes the rest."""
  lhs, rhs = operands
  contracted, batch = eqn.params["dimension_numbers"]
  for left, right in (contracted, batch):
    for one, other in zip(left, right, strict=True):
      axis_factors.tie_axes(lhs[one], rhs[other])
  return [
    [
      *(lhs[dim] for dim in batch[0]),
      *axis_factors.drop_axes(lhs, (*contracted[0], *batch[0])),
      *axis_factors.drop_axes(rhs, (*contracted[1], *batch[1])),
    ]
  ]


def _convolution(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  """Ties input and output features of a convolution, and blocks space."""
  # With G feature groups the input features are [G, in] and the output features
  # [G, out]; the kernel holds `in` and [G, out]. So a depthwise kernel (in = 1)
  # ties its output axis to its input. Dilation of either side touches only
  # space.
  lhs, rhs = operands
  params = eqn.params
  num_groups = params["feature_group_count"]
  lhs_dims, rhs_dims, out_dims = params["dimension_numbers"]
  (batch, features), space = lhs_dims[:2], lhs_dims[2:]
  (outputs, inputs), taps = rhs_dims[:2], rhs_dims[2:]

  groups = axis_factors.new_axis(num_groups)
  per_group = axis_factors.axis_length(rhs[outputs]) // num_groups
  axis_factors.tie_axes(lhs[features], groups + rhs[inputs])
  axis_factors.tie_axes(rhs[outputs], groups + axis_factors.new_axis(per_group))
  (result,) = results = new_results(eqn, "convolution")
  result[out_dims[0]] = lhs[batch]
  result[out_dims[1]] = rhs[outputs]
  fixed = [lhs[dim] for dim in space] + [rhs[dim] for dim in taps]
  if params["batch_group_count"] != 1:  # kernel gradients only
    fixed += [*lhs, *rhs, *result]
  axis_factors.block_axes(fixed, "convolution")
  return results


def _join(whole: Axes, parts: Sequence[Axes], joined: int) -> None:
  """States that `whole` is the `parts` side by side along one axis."""
  for part in parts:
    for dim, axis in enumerate(part):
      if dim != joined:
        axis_factors.tie_axes(whole[dim], axis)
  ends = axis_factors.add_axes(part[joined] for part in parts)
  axis_factors.tie_axes(whole[joined], ends)


def _concatenate(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  results = new_results(eqn)
  _join(results[0], operands, eqn.params["dimension"])
  return results


def _split(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  results = new_results(eqn)
  _join(operands[0], results, eqn.params["axis"])
  return results


def _widen(
  before: int, axis: axis_factors.Axis, after: int
) -> axis_factors.Axis:
  """Makes the axis that has some more entries before and after another."""
  new_axis = axis_factors.new_axis
  return axis_factors.add_axes([new_axis(before), axis, new_axis(after)])


def _stack(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  (result,) = results = new_results(eqn)
  dim = eqn.params["axis"]
  axis_factors.block_axes([result[dim]], "stack")
  for operand in operands:
    axis_factors.tie_all(result[:dim] + result[dim + 1 :], operand)
  return results


def _unstack(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  (operand,) = operands
  dim = eqn.params["axis"]
  axis_factors.block_axes([operand[dim]], "unstack")
  return [operand[:dim] + operand[dim + 1 :] for _ in eqn.outvars]


def _slice(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  (result,) = results = new_results(eqn)
  starts = eqn.params["start_indices"]
  strides = eqn.params["strides"] or [1] * len(starts)
  rows = zip(operands[0], result, starts, strides, strict=True)
  for whole, part, start, stride in rows:
    length, kept = map(axis_factors.axis_length, (whole, part))
    if stride == 1:
      after = length - start - kept
      axis_factors.tie_axes(whole, _widen(start, part, after))
    elif length == kept * stride:
      # One entry of every `stride`, as in interleaved gates.
      which = axis_factors.new_axis(stride, "slice")
      axis_factors.tie_axes(whole, part + which)
    else:
      axis_factors.block_axes([whole, part], STRIDED)
  return results


def _pad(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  """Puts equal entries before and after an axis; negative numbers crop it."""
  (result,) = results = new_results(eqn)
  rows = zip(operands[0], result, eqn.params["padding_config"], strict=True)
  for old, new, padding in rows:
    low, high, interior = map(int, padding)  # may be NumPy's
    if interior:
      axis_factors.block_axes([old, new], "pad")
    else:
      axis_factors.tie_axes(
        _widen(max(low, 0), old, max(high, 0)),
        _widen(max(-low, 0), new, max(-high, 0)),
      )
  return results


def _tile(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  (result,) = results = new_results(eqn)
  rows = zip(result, operands[0], eqn.params["reps"], strict=True)
  for whole, part, count in rows:
    axis_factors.tie_axes(whole, axis_factors.new_axis(count) + part)
  return results


def _broadcast(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  (result,) = results = new_results(eqn)
  dims = eqn.params["broadcast_dimensions"]
  axis_factors.tie_all([result[dim] for dim in dims], operands[0])
  return results


def _reshape(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  """Ties the shortest runs of axes that have the same number of elements."""
  (result,) = results = new_results(eqn)
  order = eqn.params["dimensions"] or range(len(operands[0]))
  sides = ([operands[0][dim] for dim in order], result)
  lengths = [map(axis_factors.axis_length, side) for side in sides]
  ends = [list(itertools.accumulate(row, operator.mul)) for row in lengths]
  common = sorted(set(ends[0]) & set(ends[1]))
  runs: list[Axes] = [[() for _ in range(len(common) + 1)] for _ in sides]
  for side, run, side_ends in zip(sides, runs, ends, strict=True):
    for axis, end in zip(side, side_ends, strict=True):
      run[bisect.bisect_left(common, end)] += axis
  axis_factors.tie_all(*runs)
  return results


def _transpose(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  return [[operands[0][dim] for dim in eqn.params["permutation"]]]


def _squeeze(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  return [axis_factors.drop_axes(operands[0], eqn.params["dimensions"])]


RULES: dict[str, Rule] = {
  **dict.fromkeys(ELEMENTWISE.split(), _elementwise),
  **dict.fromkeys(PASS_THROUGH.split(), _pass_through),
  **dict.fromkeys(REDUCTIONS.split(), _reduce),
  **dict.fromkeys(CUMULATIVE.split(), _blocking(_axis_dims)),
  **dict.fromkeys(WINDOWED.split(), _blocking(_windowed_dims)),
  **dict.fromkeys(("argmax", "argmin"), _arg_reduce),
  "broadcast_in_dim": _broadcast,
  "concatenate": _concatenate,
  "conv_general_dilated": _convolution,
  "dot_general": _dot,
  "dynamic_slice": _blocking(lambda eqn: ()),
  "dynamic_update_slice": _blocking(lambda eqn: ()),
  "gather": _gather,
  "iota": _iota,
  "pad": _pad,
  "reshape": _reshape,
  "rev": _blocking(lambda eqn: eqn.params["dimensions"]),
  "slice": _slice,
  "sort": _blocking(lambda eqn: {eqn.params["dimension"]}),
  "split": _split,
  "squeeze": _squeeze,
  "stack": _stack,
  "tile": _tile,
  "top_k": _blocking(_axis_dims),
  "transpose": _transpose,
  "unstack": _unstack,
}
"""{primitive: rule}; a primitive that is absent blocks every axis it reads."""

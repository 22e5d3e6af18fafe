"""What every primitive does to the axes of its operands: one table of rules.

A rule states which axes are tied and which are blocked, and returns the axes of
the results. It is sound when whatever it leaves free may be permuted without
changing the program's function. Jaxprs are no stable interface of JAX, so all
that is known of primitives is kept here and in `propagation`.
"""

import bisect
import itertools
import operator
from collections.abc import Callable, Collection, Sequence

from jax.extend import core as jax_core

from pqf_jax.core import axis_factors, contractions
from pqf_jax.core.axis_factors import Axes

Equation = jax_core.JaxprEqn
Rule = Callable[[Equation, Sequence[Axes]], list[Axes]]

ELEMENTWISE = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
cbrt ceil clamp clz complex conj convert_element_type cos cosh digamma div eq
erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igammac imag integer_pow
is_finite le lgamma log log1p log2 logistic lt max min mul mulhi ne neg nextafter
not one_minus_square or polygamma polynomial population_count pow real
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


def new_results(eqn: Equation, reason: str = "") -> list[Axes]:
  """Axes, not tied to anything yet, for every result of an equation."""
  shapes = [variable.aval.shape for variable in eqn.outvars]
  return [axis_factors.new_axes(shape, reason) for shape in shapes]


def tie_all(first: Axes, second: Axes) -> None:
  """Ties two values axis by axis; an axis broadcast from size 1 ties nothing."""
  for one, other in zip(first, second, strict=True):
    if axis_factors.axis_length(one) == axis_factors.axis_length(other):
      axis_factors.tie_axes(one, other)


def _elementwise(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  (result,) = results = new_results(eqn)
  for operand in operands:
    if operand:  # scalars mix freely with arrays of any rank
      tie_all(result, operand)
  return results


def _pass_through(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  del eqn
  return list(operands)


def _blocking(touched: Callable[[Equation], Collection[int]]) -> Rule:
  """A rule for primitives that mix or cut some axes and leave the others.

  An axis counts as touched as well where its length changes.
  """

  def rule(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    results = new_results(eqn)
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


def _join(whole: Axes, pieces: Sequence[Axes], joined: int, name: str) -> None:
  """States that `whole` is the `pieces` side by side along one axis.

  Pieces of equal length are one axis [piece, n] of which n stays free, tied
  over the pieces (gated units, fused projections). Others would need axes that
  are sums of factors: they are blocked.
  """
  for piece in pieces:
    for dim, axis in enumerate(piece):
      if dim != joined:
        axis_factors.tie_axes(whole[dim], axis)
  ends = [piece[joined] for piece in pieces]
  if len({axis_factors.axis_length(end) for end in ends}) == 1:
    which = axis_factors.new_axis(len(ends), name)
    for end in ends:
      axis_factors.tie_axes(whole[joined], which + end)
  else:
    axis_factors.block_axes([whole[joined], *ends], name)


def _concatenate(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  results = new_results(eqn)
  _join(results[0], operands, eqn.params["dimension"], "concatenate")
  return results


def _split(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  results = new_results(eqn)
  _join(operands[0], results, eqn.params["axis"], "split")
  return results


def _stack(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  (result,) = results = new_results(eqn)
  dim = eqn.params["axis"]
  axis_factors.block_axes([result[dim]], "stack")
  for operand in operands:
    tie_all(result[:dim] + result[dim + 1 :], operand)
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
  for whole, piece, start, stride in rows:
    length = axis_factors.axis_length(piece)
    count, rest = divmod(axis_factors.axis_length(whole), max(length, 1))
    if length and not rest and start % length == 0 and stride == 1:
      # One of `count` equal pieces: as in `_join`.
      which = axis_factors.new_axis(count, "slice")
      axis_factors.tie_axes(whole, which + piece)
    else:
      axis_factors.block_axes([whole, piece], "slice")
  return results


def _tile(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  (result,) = results = new_results(eqn)
  rows = zip(result, operands[0], eqn.params["reps"], strict=True)
  for whole, piece, count in rows:
    axis_factors.tie_axes(whole, axis_factors.new_axis(count) + piece)
  return results


def _broadcast(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  (result,) = results = new_results(eqn)
  dims = eqn.params["broadcast_dimensions"]
  tie_all([result[dim] for dim in dims], operands[0])
  return results


def _reshape(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  """Ties the shortest runs of axes that have the same number of elements."""
  (result,) = results = new_results(eqn)
  sides = (operands[0], result)
  ends = [
      list(itertools.accumulate(map(axis_factors.axis_length, side), operator.mul))
      for side in sides
  ]
  common = sorted(set(ends[0]) & set(ends[1]))
  runs = [[() for _ in range(len(common) + 1)] for _ in sides]
  for side, run, side_ends in zip(sides, runs, ends, strict=True):
    for axis, end in zip(side, side_ends, strict=True):
      run[bisect.bisect_left(common, end)] += axis
  tie_all(*runs)
  return results


def _transpose(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  return [[operands[0][dim] for dim in eqn.params["permutation"]]]


def _without(axes: Axes, dims: Collection[int]) -> Axes:
  return [axis for dim, axis in enumerate(axes) if dim not in dims]


def _squeeze(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  return [_without(operands[0], eqn.params["dimensions"])]


def _reduce(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  """The order of what is summed up does not matter."""
  return [_without(operands[0], eqn.params["axes"])]


def _arg_reduce(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  dims = eqn.params["axes"]
  axis_factors.block_axes([operands[0][dim] for dim in dims], eqn.primitive.name)
  return _reduce(eqn, operands)


def _iota(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  del operands
  (result,) = results = new_results(eqn)
  axis_factors.block_axes([result[eqn.params["dimension"]]], "iota")
  return results


def _gather(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  """Axes that are taken whole pass; everything that is indexed is blocked."""
  (result,) = results = new_results(eqn)
  operand, indices = operands
  dims = eqn.params["dimension_numbers"]
  dropped = {*dims.collapsed_slice_dims, *dims.operand_batching_dims}
  window = [dim for dim in range(len(operand)) if dim not in dropped]
  passed = {
      dim: out
      for dim, out in zip(window, dims.offset_dims, strict=True)
      if dim not in dims.start_index_map
      and eqn.params["slice_sizes"][dim]
      == axis_factors.axis_length(operand[dim])
  }
  for dim, out in passed.items():
    axis_factors.tie_axes(result[out], operand[dim])
  axis_factors.block_axes(_without(operand, passed.keys()), "gather")
  axis_factors.block_axes(_without(result, passed.values()), "gather")
  axis_factors.block_axes(indices, "gather")
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
    "argmax": _arg_reduce,
    "argmin": _arg_reduce,
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": contractions.tie_convolution,
    "dot_general": contractions.tie_dot,
    "dynamic_slice": _blocking(lambda eqn: ()),
    "dynamic_update_slice": _blocking(lambda eqn: ()),
    "gather": _gather,
    "iota": _iota,
    "pad": _blocking(_padded_dims),
    "reshape": _reshape,
    "rev": _blocking(lambda eqn: eqn.params["dimensions"]),
    "slice": _slice,
    "sort": _blocking(lambda eqn: {eqn.params["dimension"]}),
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "top_k": _blocking(lambda eqn: {eqn.params.get("axis", _last_dim(eqn))}),
    "transpose": _transpose,
    "unstack": _unstack,
}
"""{primitive: rule}; a primitive that is absent blocks all that it touches."""

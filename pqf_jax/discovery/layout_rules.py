"""Axis rules of the primitives that move elements without computing."""

import bisect
import itertools
import operator
from collections.abc import Sequence

from pqf_jax.discovery import axis_factors

Axes = axis_factors.Axes
Equation = axis_factors.Equation


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
  results = axis_factors.new_results(eqn)
  _join(results[0], operands, eqn.params["dimension"], "concatenate")
  return results


def _split(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  results = axis_factors.new_results(eqn)
  _join(operands[0], results, eqn.params["axis"], "split")
  return results


def _stack(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  (result,) = results = axis_factors.new_results(eqn)
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
  (result,) = results = axis_factors.new_results(eqn)
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
  (result,) = results = axis_factors.new_results(eqn)
  rows = zip(result, operands[0], eqn.params["reps"], strict=True)
  for whole, piece, count in rows:
    axis_factors.tie_axes(whole, axis_factors.new_axis(count) + piece)
  return results


def _broadcast(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  (result,) = results = axis_factors.new_results(eqn)
  dims = eqn.params["broadcast_dimensions"]
  axis_factors.tie_all([result[dim] for dim in dims], operands[0])
  return results


def _reshape(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  """Ties the shortest runs of axes that have the same number of elements."""
  (result,) = results = axis_factors.new_results(eqn)
  sides = (operands[0], result)
  lengths = [map(axis_factors.axis_length, side) for side in sides]
  ends = [list(itertools.accumulate(row, operator.mul)) for row in lengths]
  common = sorted(set(ends[0]) & set(ends[1]))
  runs = [[() for _ in range(len(common) + 1)] for _ in sides]
  for side, run, side_ends in zip(sides, runs, ends, strict=True):
    for axis, end in zip(side, side_ends, strict=True):
      run[bisect.bisect_left(common, end)] += axis
  axis_factors.tie_all(*runs)
  return results


def _transpose(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  return [[operands[0][dim] for dim in eqn.params["permutation"]]]


def _squeeze(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  return [axis_factors.drop_axes(operands[0], eqn.params["dimensions"])]


LAYOUT_RULES: dict[str, axis_factors.Rule] = {
  "broadcast_in_dim": _broadcast,
  "concatenate": _concatenate,
  "reshape": _reshape,
  "slice": _slice,
  "split": _split,
  "squeeze": _squeeze,
  "stack": _stack,
  "tile": _tile,
  "transpose": _transpose,
  "unstack": _unstack,
}

"""Axis rules of the two primitives that multiply weights: dot, convolution."""

from collections.abc import Sequence

from pqf_jax.discovery import axis_factors

Axes = axis_factors.Axes
Equation = axis_factors.Equation


def tie_dot(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  """`dot_general`: ties contracted pairs and batch pairs; the rest passes."""
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


def tie_convolution(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
  """`conv_general_dilated`, of any number of feature groups.

  With G groups the input features are [G, in] and the output features [G, out],
  of which a kernel holds `in` and [G, out]: a depthwise kernel (in = 1) ties
  its output axis to its input. Dilation of either side touches space alone.
  """
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
  result = axis_factors.new_axes(eqn.outvars[0].aval.shape, "convolution")
  result[out_dims[0]] = lhs[batch]
  result[out_dims[1]] = rhs[outputs]
  fixed = [lhs[dim] for dim in space] + [rhs[dim] for dim in taps]
  if params["batch_group_count"] != 1:  # kernel gradients only
    fixed += [*lhs, *rhs, *result]
  axis_factors.block_axes(fixed, "convolution")
  return [result]

"""Rows of inputs against the convolutions and products themselves."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pqf_jax.calibration import layers, streams
from pqf_jax.core import blocks
from pqf_jax.discovery import tracing


def _only_equation(function, *arguments):
  program = tracing.trace_program(function, arguments[0], arguments[1:])
  (operation,) = streams.write_out(program).operations
  return operation.eqn


@pytest.mark.parametrize(
  ("kernel", "groups", "options"),
  [
    ((3, 3, 4, 6), 1, {"padding": ((1, 1), (1, 1))}),
    ((1, 1, 4, 6), 1, {"window_strides": (2, 2)}),
    ((7, 5, 4, 6), 1, {"window_strides": (2, 1), "padding": ((3, 2), (0, 4))}),
    ((3, 2, 4, 6), 1, {"rhs_dilation": (2, 3), "lhs_dilation": (1, 2)}),
    ((3, 3, 2, 6), 2, {"padding": ((0, 1), (0, 1)), "window_strides": (2, 2)}),
    ((3, 3, 1, 8), 4, {}),
  ],
)
def test_rows_times_kernel_is_the_convolution(kernel, groups, options):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 9, 11, 4)), jnp.float32)
  w = jnp.asarray(rng.normal(size=kernel), jnp.float32)
  options = {"window_strides": (1, 1), "padding": ((0, 0), (0, 0))} | options

  def convolve(x, w):
    return lax.conv_general_dilated(
      x,
      w,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=groups,
      **options,
    )

  eqn = _only_equation(convolve, x, w)
  rows = layers.find_layer(eqn, 1, blocks.BlockSpec(1)).input_rows(x)
  by_group = np.moveaxis(np.asarray(w), (-1, -2), (0, 1))
  by_group = by_group.reshape(groups, kernel[-1] // groups, -1)
  outputs = np.einsum("pgn,gon->pgo", rows, by_group)
  expected = convolve(x, w)
  np.testing.assert_allclose(
    outputs.reshape(expected.shape), expected, atol=1e-4
  )


@pytest.mark.parametrize("side", [1, 2, 3])
@pytest.mark.parametrize(
  "options",
  [
    {"padding": ((1, 1), (1, 1))},
    {"padding": ((1, 1), (1, 1)), "window_strides": (2, 2)},
    {"padding": ((4, 2), (2, 5)), "window_strides": (3, 1)},
    {"padding": ((4, 4), (3, 3)), "rhs_dilation": (3, 2)},
    {"padding": ((2, 0), (3, 3)), "lhs_dilation": (2, 3)},
  ],
)
def test_taps_that_see_padding_alone(side, options):
  x = jnp.ones((2, side, side, 4))
  options = {"window_strides": (1, 1)} | options
  eqn = _only_equation(
    lambda x, w: lax.conv_general_dilated(
      x, w, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    ),
    x,
    jnp.ones((3, 3, 4, 6)),
  )
  layer = layers.find_layer(eqn, 1, blocks.BlockSpec(1))
  rows = np.asarray(layer.input_rows(x)).reshape(-1, 4, 9)
  np.testing.assert_array_equal(layer.find_seeing(x.shape), rows.any((0, 1)))


@pytest.mark.parametrize(
  ("contracted", "in_axes", "out_axes"),
  [
    (((2,), (0,)), (-2,), (-1,)),
    (((2,), (1,)), (1,), (0,)),
    (((2,), (0,)), (0,), (1, 2)),
    (((1, 2), (0, 1)), (0, 1), (2,)),
    (((2, 1), (0, 2)), (2, 0), (1,)),
  ],
  ids=["dense", "out_in", "heads", "of_heads", "other_order"],
)
@pytest.mark.parametrize("operand", [0, 1])
def test_rows_times_kernel_is_the_product(
  contracted, in_axes, out_axes, operand
):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(3, 4, 6)), jnp.float32)
  shape = [5, 2, 3][: len(in_axes) + len(out_axes)]
  for of_inputs, of_kernel in zip(*contracted, strict=True):
    shape[of_kernel] = x.shape[of_inputs]
  w = jnp.asarray(rng.normal(size=shape), jnp.float32)

  def product(x, w):
    if operand == 0:
      return lax.dot_general(w, x, (contracted[::-1], ((), ())))
    return lax.dot_general(x, w, (contracted, ((), ())))

  spec = blocks.BlockSpec(1, in_axes, out_axes)
  layer = layers.find_layer(_only_equation(product, x, w), operand, spec)
  rows = layer.input_rows(x)
  outputs = rows[:, 0] @ spec.to_blocks(w)[..., 0].T
  expected = product(x, w)
  if operand == 0:  # the kernel's axes come first
    first = range(len(out_axes))
    expected = jnp.moveaxis(expected, first, [i - len(first) for i in first])
  np.testing.assert_allclose(
    outputs.reshape(expected.shape), expected, atol=1e-5
  )


@pytest.mark.parametrize(
  ("dimensions", "shape", "spec"),
  [
    ((((2,), (1,)), ((0,), (0,))), (2, 4, 5), blocks.BlockSpec(1)),
    ((((2,), (1,)), ((), ())), (5, 4), blocks.BlockSpec(1)),
  ],
  ids=["batched", "other_axes"],
)
def test_products_that_use_other_axes_are_unknown(dimensions, shape, spec):
  x, w = jnp.ones((2, 3, 4)), jnp.ones(shape)
  eqn = _only_equation(lambda x, w: lax.dot_general(x, w, dimensions), x, w)
  assert layers.find_layer(eqn, 1, spec) is None


def test_reads_follow_casts_and_axes():
  def network(variables, x):
    x = x @ variables["kernel"].astype(jnp.bfloat16).astype(jnp.float32)
    x = x + variables["bias"][None]
    x = x.T - variables["mean"].reshape(-1, 1)
    return x * variables["twice"][:, None] + variables["twice"][:, None]

  variables = {
    "kernel": jnp.ones((3, 5)),
    "bias": jnp.ones(5),
    "mean": jnp.ones(5),
    "twice": jnp.ones(5),
  }
  program = streams.write_out(
    tracing.trace_program(network, variables, (jnp.ones((2, 3)),))
  )
  paths = dict(zip(program.arguments, sorted(variables), strict=False))
  found = layers.find_reads(program, paths)
  names = {op.results[0]: op.eqn.primitive.name for op in program.operations}
  assert {
    (names[result], read.path, read.operand, read.axes)
    for result, read in found.by_result.items()
  } == {
    ("dot_general", "kernel", 1, (0, 1)),
    ("add", "bias", 1, (1,)),
    ("sub", "mean", 1, (0,)),
  }


def test_streams_compute_both_networks():
  def network(scale, x):
    return jnp.cumsum(jnp.sort(jnp.tanh(x * jnp.exp(scale))))

  x, dense, quantized = jnp.array([3.0, -1.0]), jnp.array(2.0), jnp.array(-1.0)
  program = streams.write_out(tracing.trace_program(network, dense, (x,)))
  run = streams.Streams(program, [streams.Pair(dense, dense)], [[x], [2 * x]])
  run.replace(program.arguments[0], quantized)
  inputs = {}
  for operation in run.operations:
    inputs[operation.eqn.primitive.name] = run.values(operation.operands[0])
    run.run(operation)
  batches = x, 2 * x
  for pair, batch in zip(inputs["sort"], batches, strict=True):
    np.testing.assert_allclose(pair.dense, np.tanh(batch * np.exp(2.0)))
    np.testing.assert_allclose(
      pair.quantized, np.tanh(batch * np.exp(-1.0)), rtol=1e-6
    )
  # The order is the dense network's choice.
  for pair in inputs["cumsum"]:
    np.testing.assert_array_equal(pair.quantized, pair.dense)

"""Runs a traced program in float64, whatever precision it was written in.

Rounding then cannot hide a difference: two orders of the same sum agree to
1e-13 instead of 1e-5, or 1e-2 in bfloat16.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jax_core

from pqf_jax.discovery import tracing


def widen_dtype(dtype: Any) -> Any:
  """float64 or complex128 for the types of less precision; others as is."""
  if jnp.issubdtype(dtype, jnp.floating):
    return np.dtype(np.float64)
  if jnp.issubdtype(dtype, jnp.complexfloating):
    return np.dtype(np.complex128)
  return dtype


def run_widened(
  program: tracing.Jaxpr, arguments: Sequence[Any]
) -> list[jax.Array]:
  """Evaluates a program with all its floating types made float64.

  It has to be called with `jax.enable_x64(True)`, and is meant to be traced
  by `jax.jit`.

  Args:
    program: from `tracing.trace_program`; it may have been traced without
      64-bit types.
    arguments: arrays, of the types given by `widen_dtype` for its own.

  Returns:
    The results.

  Raises:
    TypeError: a primitive insists on its own type, such as a reinterpretation
      of bits.
  """
  body = getattr(program, "jaxpr", program)
  values = dict(zip(body.invars, arguments, strict=True))
  # Only programs that are closed have the attribute, in JAX before 0.12.
  constants = getattr(program, "consts", ())
  for variable, constant in zip(body.constvars, constants, strict=True):
    values[variable] = _widen(constant, variable.aval.dtype)

  def read(atom: Any) -> Any:
    if isinstance(atom, jax_core.Literal):
      return _widen(atom.val, atom.aval.dtype)
    return values[atom]

  for eqn in body.eqns:
    results = _evaluate(eqn, [read(atom) for atom in eqn.invars])
    for variable, result in zip(eqn.outvars, results, strict=True):
      if np.shape(result) != variable.aval.shape:
        raise TypeError(f"{eqn.primitive.name} gives another shape in float64")
      values[variable] = result
  return [read(atom) for atom in body.outvars]


def _evaluate(
  eqn: jax_core.JaxprEqn, operands: list[Any]
) -> Sequence[jax.Array]:
  called = tracing.called_program(eqn)
  if called is not None:
    return run_widened(called, operands)
  params = {key: _widen_param(eqn.params[key]) for key in eqn.params}
  results = eqn.primitive.bind(*operands, **params)
  return results if eqn.primitive.multiple_results else [results]


def _widen(value: Any, dtype: Any) -> Any:
  if jnp.issubdtype(dtype, jax.dtypes.extended):  # random keys
    return value
  # As NumPy's, since a constant may sit on another device.
  return np.asarray(value, widen_dtype(dtype))


def _widen_param(value: Any) -> Any:
  """Of an equation: types, and the programs of loops and branches."""
  if isinstance(value, np.dtype):
    return widen_dtype(value)
  if isinstance(value, tuple) and value:
    return tuple(map(_widen_param, value)) if _is_program(value[0]) else value
  return _widen_program(value) if _is_program(value) else value


def _is_program(value: Any) -> bool:
  return isinstance(value, (jax_core.ClosedJaxpr, jax_core.Jaxpr))


def _widen_program(program: tracing.Jaxpr) -> tracing.Jaxpr:
  body = getattr(program, "jaxpr", program)
  avals = [variable.aval for variable in body.invars]
  arguments = [
    jax.ShapeDtypeStruct(aval.shape, widen_dtype(aval.dtype)) for aval in avals
  ]
  trace = jax.make_jaxpr(lambda *values: run_widened(program, values))
  return trace(*arguments)

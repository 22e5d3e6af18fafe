"""Evaluates a traced program in float64, whatever its own precision.

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
  """Returns float64 or complex128 for types of less precision, or the type."""
  if jnp.issubdtype(dtype, jnp.floating):
    return np.dtype(np.float64)
  if jnp.issubdtype(dtype, jnp.complexfloating):
    return np.dtype(np.complex128)
  return dtype


def run_widened(
  program: tracing.Jaxpr, arguments: Sequence[Any]
) -> list[jax.Array]:
  """Evaluates a program with all its floating types made float64.

  Call it with `jax.enable_x64(True)`, traced by `jax.jit`; the program may have
  been traced without 64-bit types. The arguments have the types that
  `widen_dtype` gives for those of the program.

  Raises:
    TypeError: a primitive works in one type only, such as a reinterpretation
      of bits.
  """
  body = tracing.program_body(program)
  values = dict(zip(body.invars, arguments, strict=True))
  for variable, constant in tracing.program_constants(program).items():
    values[variable] = _widen(constant, variable.aval.dtype)

  def read(atom: Any) -> Any:
    literal = isinstance(atom, jax_core.Literal)
    return _widen(atom.val, atom.aval.dtype) if literal else values[atom]

  for eqn in body.eqns:
    results = _evaluate(eqn, [read(atom) for atom in eqn.invars])
    for variable, result in zip(eqn.outvars, results, strict=True):
      if np.shape(result) != variable.aval.shape:
        raise TypeError(
          f"{eqn.primitive.name} gives shape {np.shape(result)} in float64, "
          f"expected {variable.aval.shape}"
        )
      values[variable] = result
  return [read(atom) for atom in body.outvars]


def _evaluate(
  eqn: tracing.Equation, operands: list[Any]
) -> Sequence[jax.Array]:
  called = tracing.called_program(eqn)
  if called is not None:
    return run_widened(called, operands)
  params = {key: _widen_param(eqn.params[key]) for key in eqn.params}
  return tracing.evaluate(eqn, operands, params)


def _widen(value: Any, dtype: Any) -> Any:
  if jnp.issubdtype(dtype, jax.dtypes.extended):  # random keys
    return value
  # As NumPy's, since a constant may sit on another device.
  return np.asarray(value, widen_dtype(dtype))


def _widen_param(value: Any) -> Any:
  """Widens a parameter of an equation: a type, or programs that it runs."""
  if isinstance(value, np.dtype):
    return widen_dtype(value)
  if isinstance(value, tuple) and value:
    return tuple(map(_widen_param, value)) if _is_program(value[0]) else value
  return _widen_program(value) if _is_program(value) else value


def _is_program(value: Any) -> bool:
  return isinstance(value, (jax_core.ClosedJaxpr, jax_core.Jaxpr))


def _widen_program(program: tracing.Jaxpr) -> tracing.Jaxpr:
  body = tracing.program_body(program)
  avals = [variable.aval for variable in body.invars]
  arguments = [
    jax.ShapeDtypeStruct(aval.shape, widen_dtype(aval.dtype)) for aval in avals
  ]
  trace = jax.make_jaxpr(lambda *values: run_widened(program, values))
  return trace(*arguments)

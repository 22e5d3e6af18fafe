"""Traces an apply function into a program that can be read and rewritten.

Jaxprs are not a stable interface of JAX: this module, `rules` and `propagation`
hold all knowledge of them; `widening` and `calibration.streams` evaluate them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core as jax_core

from pqf_jax import errors
from pqf_jax.core import modules

PyTree = Any
ApplyFn = Callable[..., PyTree]
Equation = jax_core.JaxprEqn
Jaxpr = Any
"""`Jaxpr` or `ClosedJaxpr`: JAX 0.12 makes them one."""

CALLS = """
call checkpoint closed_call core_call custom_jvp_call custom_vjp_call
custom_vjp_call_jaxpr eval_jaxpr jit pjit remat remat2
"""
CALLED = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def trace_program(
  apply_fn: ApplyFn, variables: PyTree, inputs: tuple[PyTree, ...]
) -> Jaxpr:
  """Traces `apply_fn(variables, *inputs)` without running it.

  The program's arguments are the leaves of the variables, then of the inputs,
  as `trees.leaves` lists them; both may be `jax.ShapeDtypeStruct`s.

  Raises:
    InputError: the function cannot be traced.
  """
  try:
    # A new function, since bound methods of modules need not be hashable.
    return jax.make_jaxpr(lambda *sealed: modules.call(apply_fn, *sealed))(
      modules.seal(variables), modules.seal(inputs)
    )
  except Exception as error:  # whatever the caller's function may raise
    reason = str(error).strip().partition("\n")[0]
    raise errors.InputError(
      "the apply function cannot be traced by JAX: "
      f"{type(error).__name__}: {reason} -- it has to be a function of "
      "(variables, *inputs) made of JAX operations; give several inputs, and "
      "Python flags, as pqf_jax.Inputs(images, mask, train=False)"
    ) from error


def program_body(program: Jaxpr) -> Jaxpr:
  """Returns the equations of a program, without the values of its constants."""
  return getattr(program, "jaxpr", program)


def live_equations(program: Jaxpr) -> list[Equation]:
  """Returns the equations whose results are read, or that have effects.

  Tracing keeps the others, such as a slice of which only the shape is used.
  """
  body = program_body(program)
  wanted = {*_variables(body.outvars)}
  kept = []
  for eqn in reversed(body.eqns):
    if eqn.effects or not wanted.isdisjoint(eqn.outvars):
      kept.append(eqn)
      wanted.update(_variables(eqn.invars))
  return kept[::-1]


def _variables(atoms: Sequence[Any]) -> list[Any]:
  return [atom for atom in atoms if not isinstance(atom, jax_core.Literal)]


def program_constants(program: Jaxpr) -> dict[Any, Any]:
  """Returns {variable: value} of the constants of a program."""
  variables = program_body(program).constvars
  # In JAX before 0.12 only closed programs have the attribute.
  values = getattr(program, "consts", ())
  return dict(zip(variables, values, strict=True))


def evaluate(
  eqn: Equation, operands: Sequence[Any], params: Mapping[str, Any]
) -> Sequence[jax.Array]:
  """Returns the results of an equation that calls no program.

  Args:
    eqn: the equation.
    operands: values of its operands.
    params: its parameters, or others in their place.
  """
  results = eqn.primitive.bind(*operands, **params)
  return results if eqn.primitive.multiple_results else [results]


def called_program(eqn: Equation) -> Jaxpr | None:
  """Returns the program that an equation only calls, or None."""
  if eqn.primitive.name not in CALLS.split():
    return None
  return next(eqn.params[key] for key in CALLED if key in eqn.params)


def count_unstacked(eqn: Equation) -> tuple[int, int]:
  """Returns how many operands of a scan are constants, and how many a carry.

  Operands are constants, carry and stacked inputs, in this order; results are
  carry and stacked outputs. A stacked one has one axis more than inside the
  loop: this holds in all versions of JAX, the parameters that say it do not.
  """
  body = program_body(eqn.params["jaxpr"])
  unstacked = _count_same_rank(eqn.invars, body.invars)
  num_carried = _count_same_rank(eqn.outvars, body.outvars)
  return unstacked - num_carried, num_carried


def _count_same_rank(outside: Sequence[Any], inside: Sequence[Any]) -> int:
  pairs = zip(outside, inside, strict=True)
  return sum(len(shape_of(x)) == len(shape_of(y)) for x, y in pairs)


def shape_of(atom: Any) -> tuple[int, ...]:
  """Returns the shape of a variable or literal; () for side-effect tokens."""
  return getattr(atom.aval, "shape", ())

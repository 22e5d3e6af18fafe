"""Finds the kernels that read a network's inputs before any other kernel."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from jax.extend import core as jax_core

from pqf_jax.core import trees
from pqf_jax.discovery import tracing


class _Value(NamedTuple):
  """What a value of a program was computed from.

  Attributes:
    kernels: the kernels, where it depends on variables alone.
    is_input: it depends on the inputs.
    is_deep: on the inputs through a kernel.
  """

  kernels: frozenset[str] = frozenset()
  is_input: bool = False
  is_deep: bool = False


def find_first_kernels(
  apply_fn: tracing.ApplyFn,
  variables: Any,
  inputs: tuple[Any, ...],
  kernels: Collection[str],
) -> set[str]:
  """Returns the kernels that meet the inputs, or what no kernel has touched.

  Args:
    apply_fn: `apply_fn(variables, *inputs)`, traced only.
    variables: variable tree; shapes suffice.
    inputs: likewise.
    kernels: the paths of its kernels.
  """
  program = tracing.trace_program(apply_fn, variables, inputs)
  arguments = [
    _Value(frozenset({path} & set(kernels)))
    for path in trees.flatten(variables)
  ]
  arguments += [_Value(is_input=True)] * len(trees.leaves(inputs))
  found: set[str] = set()
  _walk(program, arguments, found)
  return found


def _walk(
  program: tracing.Jaxpr, arguments: Sequence[_Value], found: set[str]
) -> list[_Value]:
  """Returns the results of a program; adds what it finds."""
  body = tracing.program_body(program)
  known = dict(zip(body.invars, arguments, strict=True))
  for eqn in body.eqns:
    operands = [_read(known, atom) for atom in eqn.invars]
    called = tracing.called_program(eqn)
    if eqn.primitive.name == "scan":  # its first pass
      called = eqn.params["jaxpr"]
    if called is not None:
      results = _walk(called, operands, found)
    else:
      results = [_join(operands, found)] * len(eqn.outvars)
    known.update(zip(eqn.outvars, results, strict=True))
  return [_read(known, atom) for atom in body.outvars]


def _read(known: Mapping[Any, _Value], atom: Any) -> _Value:
  if isinstance(atom, jax_core.Literal):
    return _Value()
  return known.get(atom, _Value())  # constants of the program


def _join(operands: Sequence[_Value], found: set[str]) -> _Value:
  read = frozenset().union(*(value.kernels for value in operands))
  is_input = any(value.is_input for value in operands)
  is_deep = any(value.is_deep for value in operands)
  if not is_input:
    return _Value(read)
  # A loop that reads several does not say which is the first.
  if len(read) == 1 and not is_deep:
    found |= read
  return _Value(is_input=True, is_deep=is_deep or bool(read))

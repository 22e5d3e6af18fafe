"""Runs a program for two sets of variables, equation by equation."""

import collections
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jax_core

from pqf_jax.calibration import programs
from pqf_jax.discovery import tracing

# Equations that choose, such as the boxes that a detector keeps. Both networks
# follow the choice of the dense one, so that their values stay comparable.
CHOICES = frozenset(
  ["approx_top_k", "argmax", "argmin", "sort", "top_k", "while"]
)


class Operation(NamedTuple):
  """An equation that calls no other program.

  Attributes:
    eqn: the equation.
    operands: numbers of values, and literals.
    results: numbers of values.
  """

  eqn: tracing.Equation
  operands: tuple[Any, ...]
  results: tuple[int, ...]

  @property
  def reads(self) -> list[int]:
    """Returns the operands that are not literals."""
    return [atom for atom in self.operands if isinstance(atom, int)]


class Program(NamedTuple):
  """A program whose calls are written out.

  Attributes:
    variables: the arguments, as the program declares them.
    arguments: their numbers.
    constants: {number: value}.
    operations: in the order of the program.
  """

  variables: tuple[Any, ...]
  arguments: tuple[int, ...]
  constants: dict[int, Any]
  operations: tuple[Operation, ...]


def write_out(program: tracing.Jaxpr, num_variables: int = 0) -> Program:
  """Numbers the values of a program, and writes out what it calls.

  Loops along the layers of a stack of kernels are written out as well.

  Args:
    program: the program.
    num_variables: how many of its arguments, the first, are variables.
  """
  constants: dict[int, Any] = {}
  operations: list[Operation] = []
  counter = itertools.count()
  # {number that depends on no input: whether it does on variables}.
  fixed: dict[int, bool] = {}

  def runs_along_layers(eqn: tracing.Equation, atoms: Sequence[Any]) -> bool:
    if eqn.primitive.name != "scan":
      return False
    first = sum(tracing.count_unstacked(eqn))
    return any(
      isinstance(atom, int) and fixed.get(atom, False) and _rank(x) > 2
      for atom, x in zip(atoms[first:], eqn.invars[first:], strict=True)
    )

  def loop(eqn: tracing.Equation, atoms: Sequence[Any]) -> list[Any]:
    """Walks each step; a loop has constants, carry and stacked operands."""
    body = eqn.params["jaxpr"]
    num_kept, num_carried = tracing.count_unstacked(eqn)
    first = num_kept + num_carried
    kept, carry = list(atoms[:num_kept]), list(atoms[num_kept:first])
    steps = range(eqn.params["length"])
    rows: dict[int, list[Any]] = {}
    for i in reversed(steps) if eqn.params["reverse"] else steps:
      layer = [
        walk(_layer_program(x, i), [atom])[0]
        for x, atom in zip(eqn.invars[first:], atoms[first:], strict=True)
      ]
      results = walk(body, [*kept, *carry, *layer])
      carry, rows[i] = results[:num_carried], results[num_carried:]
    columns = zip(*(rows[i] for i in steps), strict=True)
    stacked = [
      walk(_stack_program(x), column)[0]
      for x, column in zip(eqn.outvars[num_carried:], columns, strict=True)
    ]
    return [*carry, *stacked]

  def walk(program: tracing.Jaxpr, operands: Sequence[Any]) -> list[Any]:
    body = tracing.program_body(program)
    numbers = dict(zip(body.invars, operands, strict=True))
    for variable, value in tracing.program_constants(program).items():
      numbers[variable] = next(counter)
      constants[numbers[variable]] = value
      fixed[numbers[variable]] = False

    def read(atom: Any) -> Any:
      return atom if isinstance(atom, jax_core.Literal) else numbers[atom]

    for eqn in body.eqns:
      atoms = tuple(read(atom) for atom in eqn.invars)
      called = tracing.called_program(eqn)
      if called is not None:
        results = walk(called, atoms)
      elif runs_along_layers(eqn, atoms):
        results = loop(eqn, atoms)
      else:
        results = [next(counter) for _ in eqn.outvars]
        operation = Operation(eqn, atoms, tuple(results))
        operations.append(operation)
        if fixed.keys() >= set(operation.reads):
          depends = any(fixed[atom] for atom in operation.reads)
          fixed.update(dict.fromkeys(results, depends))
      numbers.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in body.outvars]

  variables = tuple(tracing.program_body(program).invars)
  arguments = tuple(next(counter) for _ in variables)
  fixed.update(dict.fromkeys(arguments[:num_variables], True))
  walk(program, arguments)
  return Program(variables, arguments, constants, tuple(operations))


def run_order(
  operations: Sequence[Operation], groups: Sequence[Collection[int]]
) -> Iterator[list[Operation]]:
  """Yields operations in an order in which those of a group come together.

  Where some of a group depend on others, all of it comes one by one, as do
  operations of no group; otherwise the order stays.

  Args:
    operations: in an order in which they can run.
    groups: of operations, as the numbers of their first results.
  """
  pending = {operation.results[0]: operation for operation in operations}
  unknown = {number for each in operations for number in each.results}
  groups = [group for group in groups if pending.keys() >= set(group)]
  units: dict[int, tuple[int, ...]] = {first: (first,) for first in pending}
  units |= {first: tuple(group) for group in groups for first in group}

  def can_run(first: int) -> bool:
    return unknown.isdisjoint(pending[first].reads)

  while pending:
    unit = next((units[n] for n in pending if all(map(can_run, units[n]))), ())
    if not unit:
      unit = (next(filter(can_run, pending)),)
      units |= {first: (first,) for first in units[unit[0]]}
    together = [pending.pop(first) for first in unit]
    unknown.difference_update(*(each.results for each in together))
    yield together


def _rank(atom: Any) -> int:
  return len(tracing.shape_of(atom))


def _layer_program(stack: Any, index: int) -> tracing.Jaxpr:
  """Returns the program that takes one layer of a stack."""
  shape = jax.ShapeDtypeStruct(stack.aval.shape, stack.aval.dtype)
  return jax.make_jaxpr(lambda x: lax.index_in_dim(x, index, 0, False))(shape)


def _stack_program(stack: Any) -> tracing.Jaxpr:
  """Returns the program that stacks layers."""
  count, *rest = stack.aval.shape
  shape = jax.ShapeDtypeStruct(rest, stack.aval.dtype)
  return jax.make_jaxpr(lambda *layers: jnp.stack(layers))(*[shape] * count)


class Pair(NamedTuple):
  """A value in the dense network, and in the quantized one."""

  dense: Any
  quantized: Any


class Streams:
  """The values of both networks on some batches, while a program runs.

  What depends on variables alone is computed when it is first read. So a
  variable may be replaced before the layer that reads it.

  Attributes:
    operations: those that depend on the inputs, in their order.
  """

  def __init__(
    self,
    program: Program,
    leaves: Sequence[Pair],
    batches: Sequence[Sequence[Any]],
  ):
    inputs = program.arguments[len(leaves) :]
    self._fixed = dict(zip(program.arguments, leaves, strict=False))
    self._fixed |= {n: Pair(v, v) for n, v in program.constants.items()}
    self._batches = [
      {n: Pair(x, x) for n, x in zip(inputs, batch, strict=True)}
      for batch in batches
    ]
    self._makers: dict[int, Operation] = {}
    self.operations: list[Operation] = []
    moving = set(inputs)
    for operation in program.operations:
      if moving.isdisjoint(operation.reads):
        self._makers |= dict.fromkeys(operation.results, operation)
      else:
        moving.update(operation.results)
        self.operations.append(operation)
    self._unread = collections.Counter(
      atom for operation in self.operations for atom in operation.reads
    )

  def replace(self, leaf: int, value: Any) -> None:
    """Gives the quantized network another value of a variable."""
    self._fixed[leaf] = Pair(self._fixed[leaf].dense, value)
    stale = {leaf}
    for number, operation in self._makers.items():  # as the program has them
      if not stale.isdisjoint(operation.reads):
        stale.add(number)
        self._fixed.pop(number, None)

  def values(self, atom: Any) -> list[Pair]:
    """Returns a value on every batch."""
    return [self._read(atom, batch) for batch in self._batches]

  def run(self, operation: Operation) -> None:
    """Computes an operation on every batch, and forgets what is done with."""
    self._unread.subtract(operation.reads)
    done = [
      atom
      for atom in {*operation.reads, *operation.results}
      if not self._unread[atom]
    ]
    for batch in self._batches:
      results = self._evaluate(operation, batch)
      batch.update(zip(operation.results, results, strict=True))
      for atom in done:
        batch.pop(atom, None)

  def _read(self, atom: Any, batch: Mapping[int, Pair]) -> Pair:
    if not isinstance(atom, int):
      return Pair(atom.val, atom.val)
    if atom in batch:
      return batch[atom]
    if atom not in self._fixed:
      operation = self._makers[atom]
      results = self._evaluate(operation, {})
      self._fixed |= dict(zip(operation.results, results, strict=True))
    return self._fixed[atom]

  def _evaluate(
    self, operation: Operation, batch: Mapping[int, Pair]
  ) -> list[Pair]:
    pairs = [self._read(atom, batch) for atom in operation.operands]
    eqn = operation.eqn
    dense = programs.evaluate(eqn, [pair.dense for pair in pairs])
    if eqn.primitive.name in CHOICES:
      return [Pair(value, value) for value in dense]
    quantized = programs.evaluate(eqn, [pair.quantized for pair in pairs])
    return list(map(Pair, dense, quantized))

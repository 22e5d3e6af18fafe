"""Carries axis factors through a program, equation by equation."""

import itertools
from collections.abc import Sequence
from typing import Any

from jax.extend import core as jax_core

from pqf_jax.discovery import axis_factors, loops, rules, tracing

Axes = axis_factors.Axes
Equation = tracing.Equation


class Propagation:
  """One walk over a program.

  Attributes:
    read_order: {id of an axis: how many axes the program read before it}.
      Rules pass on the very same tuple, so that the axes of a parameter, kept
      alive by the caller, can be looked up.
    unknown: names of the primitives that have no rule.
    walked: the axes that loops walk, outer loops first.
    seen: which axes are found together.
  """

  def __init__(self) -> None:
    self.read_order: dict[int, int] = {}
    self.unknown: set[str] = set()
    self.walked: list[axis_factors.Axis] = []
    self.seen: list[loops.Seen] = []
    self._around: tuple[axis_factors.Axis, ...] = ()

  def run(self, program: tracing.Jaxpr, operands: Sequence[Axes]) -> list[Axes]:
    """Returns the axes of a program's results, given those of its arguments.

    Ties and blocks are stated on the factors themselves. Constants of the
    program are blocked, since nobody permutes them.
    """
    body = tracing.program_body(program)
    values = dict(zip(body.invars, operands, strict=True))
    for variable in body.constvars:
      values[variable] = self._constant(variable)

    def read(atom: Any) -> Axes:
      literal = isinstance(atom, jax_core.Literal)
      return self._constant(atom) if literal else values[atom]

    for eqn in tracing.live_equations(program):
      results = self._apply(eqn, [read(atom) for atom in eqn.invars])
      values.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in body.outvars]

  def _constant(self, atom: Any) -> Axes:
    return axis_factors.new_axes(tracing.shape_of(atom), "constant")

  def _apply(self, eqn: Equation, operands: list[Axes]) -> list[Axes]:
    name = eqn.primitive.name
    called = tracing.called_program(eqn)
    if called is not None:
      return self.run(called, operands)
    if name == "scan":
      return self._scan(eqn, operands)
    if name == "while":
      return self._while(eqn, operands)
    if name == "cond":
      return self._cond(eqn, operands)
    for axis in itertools.chain.from_iterable(operands):
      self.read_order.setdefault(id(axis), len(self.read_order))
    self._see(operands, together=name in rules.ALIGNED)
    if name in rules.RULES:
      return rules.RULES[name](eqn, operands)
    self.unknown.add(name)
    for operand in operands:
      axis_factors.block_axes(operand, name)
    return rules.new_results(eqn, name)

  def _see(self, operands: Sequence[Axes], *, together: bool) -> None:
    for axes in operands:
      parts = [axes] if together else [[axis] for axis in axes]
      self.seen += [loops.Seen(part, self._around) for part in parts]

  def _scan(self, eqn: Equation, operands: list[Axes]) -> list[Axes]:
    """Ties the carry to itself, and blocks the axis that the loop walks."""
    body = tracing.program_body(eqn.params["jaxpr"])
    walked = axis_factors.new_axis(eqn.params["length"], "scan")
    results = rules.new_results(eqn)

    def step(axes: Axes, variable: Any) -> Axes:
      """Returns the axes that one step reads, or writes, of a value."""
      stacked = len(axes) - len(tracing.shape_of(variable))
      axis_factors.tie_all(axes[:stacked], [walked] * stacked)
      return axes[stacked:] if stacked else axes

    self._see(operands, together=True)
    self.walked.append(walked)
    around, self._around = self._around, (*self._around, walked)
    outputs = self.run(body, list(map(step, operands, body.invars)))
    self._around = around
    for result, output in zip(
      map(step, results, body.outvars), outputs, strict=True
    ):
      axis_factors.tie_all(result, output)
    num_constants, num_carried = tracing.count_unstacked(eqn)
    started = operands[num_constants:][:num_carried]
    for before, after in zip(started, outputs[:num_carried], strict=True):
      axis_factors.tie_all(before, after)
    return results

  def _while(self, eqn: Equation, operands: list[Axes]) -> list[Axes]:
    first = eqn.params["cond_nconsts"]
    second = first + eqn.params["body_nconsts"]
    carry = operands[second:]
    self.run(eqn.params["cond_jaxpr"], operands[:first] + carry)
    outputs = self.run(eqn.params["body_jaxpr"], operands[first:second] + carry)
    for before, after in zip(carry, outputs, strict=True):
      axis_factors.tie_all(before, after)
    return outputs

  def _cond(self, eqn: Equation, operands: list[Axes]) -> list[Axes]:
    results = rules.new_results(eqn)
    for branch in eqn.params["branches"]:
      outputs = self.run(branch, operands[1:])
      for result, output in zip(results, outputs, strict=True):
        axis_factors.tie_all(result, output)
    return results

"""Carries axis factors through a jaxpr, equation by equation."""

import itertools
from collections.abc import Sequence
from typing import Any

from jax.extend import core as jax_core

from pqf_jax.discovery import axis_factors, axis_rules, tracing

Axes = axis_factors.Axes
Equation = axis_factors.Equation


class Propagation:
  """One walk over a program.

  Attributes:
    reads: {id of an axis: how many axes the program read before it}. Rules
      hand on the very same tuple, so that the axes of a parameter, kept alive
      by the caller, can be looked up.
    unknown: names of the primitives that have no rule.
  """

  def __init__(self) -> None:
    self.reads: dict[int, int] = {}
    self.unknown: set[str] = set()

  def run(self, jaxpr: tracing.Jaxpr, operands: Sequence[Axes]) -> list[Axes]:
    """The axes of the results, given those of the arguments.

    Ties and blocks are stated on the factors themselves. Constants of the
    program are blocked, since nobody permutes them.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    values = dict(zip(jaxpr.invars, operands, strict=True))
    for variable in jaxpr.constvars:
      values[variable] = axis_factors.new_axes(variable.aval.shape, "constant")

    def read(atom: Any) -> Axes:
      if isinstance(atom, jax_core.Literal):
        return axis_factors.new_axes(atom.aval.shape, "constant")
      return values[atom]

    for eqn in jaxpr.eqns:
      results = self._apply(eqn, [read(atom) for atom in eqn.invars])
      values.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]

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
      self.reads.setdefault(id(axis), len(self.reads))
    if name in axis_rules.RULES:
      return axis_rules.RULES[name](eqn, operands)
    self.unknown.add(name)
    for operand in operands:
      axis_factors.block_axes(operand, name)
    return axis_factors.new_results(eqn, name)

  def _scan(self, eqn: Equation, operands: list[Axes]) -> list[Axes]:
    """Ties what the loop carries to itself; blocks the axis it walks along.

    Operands are constants, carry, and stacked inputs; results are carry and
    stacked outputs. The stacked ones are those with one axis more than inside,
    which, unlike the parameters of the equation, all versions of JAX share.
    """
    body = eqn.params["jaxpr"]
    body = getattr(body, "jaxpr", body)
    inner = [
      self._step(operand, variable.aval.ndim)
      for operand, variable in zip(operands, body.invars, strict=True)
    ]
    outputs = self.run(body, inner)
    results = axis_factors.new_results(eqn)
    for result, output in zip(results, outputs, strict=True):
      axis_factors.tie_all(self._step(result, len(output)), output)
    constants_and_carry = self._unstacked(operands, inner)
    carried = self._unstacked(outputs, results)
    started = constants_and_carry[len(constants_and_carry) - len(carried) :]
    for before, after in zip(started, carried, strict=True):
      axis_factors.tie_all(before, after)
    return results

  def _unstacked(self, values: list[Axes], others: list[Axes]) -> list[Axes]:
    pairs = zip(values, others, strict=True)
    return [one for one, other in pairs if len(one) == len(other)]

  def _step(self, axes: Axes, ndim: int) -> Axes:
    """What one step of a scan sees of a value."""
    stacked = len(axes) - ndim
    axis_factors.block_axes(axes[:stacked], "scan")
    return axes[stacked:] if stacked else axes

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
    results = axis_factors.new_results(eqn)
    for branch in eqn.params["branches"]:
      outputs = self.run(branch, operands[1:])
      for result, output in zip(results, outputs, strict=True):
        axis_factors.tie_all(result, output)
    return results

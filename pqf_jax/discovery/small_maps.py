"""Compiles convolutions whose kernel has more taps than their map has places.

XLA's compiler for CPUs swaps kernel and map of such a convolution, into a form
for which it has no fast code: 84 ms instead of 3 for 3x3 taps, 256 channels and
64 maps of 2x2. Its simplifier does so, which has no switch for this alone, and
the rest of it gains little: a training step of ResNet-18 with images of 32
pixels takes .3 instead of 1.2 CPU seconds without it.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend import core as jax_core

from pqf_jax.discovery import tracing

_NOT_SIMPLIFIED = {"xla_disable_hlo_passes": "algsimp"}


def jit(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
  """Returns `jax.jit` of a function that no other program calls.

  Its first call decides for all how it is compiled.

  Args:
    function: any.
    **settings: of `jax.jit`.
  """
  plain = jax.jit(function, **settings)
  chosen: list[Callable[..., Any]] = []

  def call(*args: Any) -> Any:
    if not chosen:
      options = compiler_options(equations(plain.trace(*args).jaxpr))
      chosen.append(
        jax.jit(function, compiler_options=options, **settings)
        if options
        else plain
      )
    return chosen[0](*args)

  return call


def compiler_options(program: Iterable[tracing.Equation]) -> dict[str, str]:
  """Returns the options with which `jax.jit` compiles these equations best."""
  if jax.default_backend() != "cpu":
    return {}
  return _NOT_SIMPLIFIED if any(map(_is_swapped, program)) else {}


def equations(program: tracing.Jaxpr) -> Iterator[tracing.Equation]:
  """Yields the equations of a program and of all programs in it."""
  for eqn in tracing.program_body(program).eqns:
    yield eqn
    for part in jax.tree.leaves(tuple(eqn.params.values()), is_leaf=_is_jaxpr):
      if _is_jaxpr(part):
        yield from equations(part)


def _is_jaxpr(part: Any) -> bool:
  return isinstance(part, (jax_core.Jaxpr, jax_core.ClosedJaxpr))


def _is_swapped(eqn: tracing.Equation) -> bool:
  params = eqn.params
  if eqn.primitive.name != "conv_general_dilated" or (
    params["feature_group_count"] * params["batch_group_count"] > 1
  ):
    return False
  numbers = params["dimension_numbers"]
  places, taps = (
    np.prod([tracing.shape_of(atom)[axis] for axis in spec[2:]])
    for atom, spec in zip(
      eqn.invars, (numbers.lhs_spec, numbers.rhs_spec), strict=True
    )
  )
  return bool(taps > places)

"""How XLA compiles the programs of the calibration, which run a few times."""

import functools
from typing import Any

import jax

from pqf_jax import nvidia
from pqf_jax.discovery import small_maps, tracing

# ResNet-18 on an H200 takes 59 s, of which 6 s are not compilation; with XLA's
# trials more than 160 s. Other platforms do not look at these options.
_OPTIONS = nvidia.NO_TRIALS
_SEARCHED = frozenset(["conv_general_dilated", "dot_general"])

# `jax.jit` of programs that no other program calls.
jit = functools.partial(jax.jit, compiler_options=_OPTIONS)


def evaluate(eqn: tracing.Equation, operands: list[Any]) -> list[Any]:
  """Returns the results of an equation that calls no program."""
  if eqn.primitive.name not in _SEARCHED:
    return list(tracing.evaluate(eqn, operands, eqn.params))
  options = tuple(small_maps.compiler_options([eqn]).items())
  return [
    _product(eqn.primitive, tuple(eqn.params.items()), options)(*operands)
  ]


@functools.lru_cache(maxsize=256)
def _product(
  primitive: Any,
  params: tuple[tuple[str, Any], ...],
  options: tuple[tuple[str, str], ...],
) -> Any:
  bind = functools.partial(primitive.bind, **dict(params))
  return jax.jit(bind, compiler_options=_OPTIONS | dict(options))

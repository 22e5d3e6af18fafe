"""Kernels that show in a traced program where a layer reads them.

A layer reads a `Probe` as it reads a `VQArray`. Only there can be seen which
axes `vmap` maps: in the products that it makes they look like any other.
"""

from collections.abc import Sequence
from typing import Any, TypeGuard

import jax
from flax import nnx
from jax.extend import core as jax_core
from jax.interpreters import batching

from pqf_jax.core import blocks, vq_array

PRIMITIVE = jax_core.Primitive("pqf_read_kernel")
"""Returns its operand; `mapped` are the axes along which `vmap` runs it."""


class Probe(vq_array.VQArray):
  """A dense kernel, held in the place of a codebook, that is seen when read."""

  @classmethod
  def of(cls, leaf: Any) -> "Probe":
    """Returns the probe of an array or a shape."""
    no_codes: Any = None
    return cls(leaf, no_codes, (), blocks.BlockSpec(1))

  @property
  def shape(self) -> tuple[int, ...]:
    """Returns the shape of the array."""
    return self.codebook.shape

  def decode(self) -> jax.Array:
    """Returns the array, by an equation of its own."""
    return PRIMITIVE.bind(self.codebook, mapped=())

  __jax_array__ = decode
  unbox = decode


nnx.register_data_type(Probe)


def is_probe(leaf: Any) -> TypeGuard[Probe]:
  """Returns whether a node of a variable tree is a `Probe`."""
  return isinstance(leaf, Probe)


def _batch(
  operands: Sequence[Any], dims: Sequence[int], *, mapped: tuple[int, ...]
) -> tuple[Any, int]:
  (operand,), (dim,) = operands, dims
  others = (axis + (axis >= dim) for axis in mapped)
  return PRIMITIVE.bind(operand, mapped=(*others, dim)), dim


PRIMITIVE.def_abstract_eval(lambda operand, **_: operand)
batching.primitive_batchers[PRIMITIVE] = _batch

"""Arrays that are spread over devices, and are not to be gathered on the host.

`np.asarray` of such an array would keep a copy on the host as long as it lives.
"""

import functools
import types
from collections.abc import Callable
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding

Array = jax.Array | np.ndarray


def is_spread(leaf: Any) -> TypeGuard[jax.Array]:
  """Returns whether several devices have a leaf, or parts of it."""
  return isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1


def reduce(
  function: Callable[[types.ModuleType, Any], Any], leaf: Array
) -> Any:
  """Returns `function(numpy, leaf)`, such as a sum.

  Of a spread leaf it is one program of `jax.numpy`, and no host or device has
  the whole; others need no program.
  """
  return _reduce(function, leaf) if is_spread(leaf) else function(np, leaf)


@functools.partial(jax.jit, static_argnums=0)
def _reduce(
  function: Callable[[types.ModuleType, Any], Any], leaf: jax.Array
) -> Any:
  return function(jnp, leaf)


def own(leaf: Array) -> Array:
  """Returns a copy of a spread leaf, and any other leaf itself.

  What is kept on the host of a copy that moves goes with it.
  """
  return jnp.copy(leaf) if is_spread(leaf) else leaf


def to_host(leaf: Array) -> np.ndarray:
  """Returns a leaf on the host, where nothing is kept of a spread one."""
  return np.asarray(own(leaf))


def take(
  leaf: Array, order: np.ndarray, axis: int, *, donate: bool = False
) -> Array:
  """Returns the entries of a leaf in another order along an axis.

  It stays where it is. A device that has a part of this axis gets instead a
  part of another axis for the time, if there is one that can be cut; of more
  than a matrix, one entry of the first axis at a time.

  Args:
    leaf: of any rank.
    order: which entry each new one is: [n], or with as many axes as the leaf,
      of its lengths or 1, where it differs along them.
    axis: along which they are.
    donate: whether a spread leaf may be deleted, whose memory the result takes.
  """
  if is_spread(leaf):
    place = leaf.sharding
    if isinstance(place, NamedSharding) and _is_auto(place):
      program = _take_in_place if donate else _take
      return program(leaf, order, axis, place)
    return jax.device_put(_take_entries(to_host(leaf), order, axis), place)
  return _take_entries(leaf, order, axis)


def _take_entries(leaf: Array, order: np.ndarray, axis: int) -> Array:
  # NumPy leaves stay NumPy, and nothing is compiled.
  numpy = jnp if isinstance(leaf, jax.Array) else np
  take = numpy.take if order.ndim == 1 else numpy.take_along_axis
  return take(leaf, order, axis)


def _is_auto(place: NamedSharding) -> bool:
  return all(kind == AxisType.Auto for kind in place.mesh.axis_types)


def _reordered(
  leaf: jax.Array, order: jax.Array, axis: int, place: NamedSharding
) -> jax.Array:
  cuts = _cuts(place, leaf.ndim)
  if leaf.ndim < 3 or axis == 0 or cuts[0] is not None:
    return _reordered_at_once(leaf, order, axis, place)
  inside = place.update(spec=PartitionSpec(*cuts[1:]))

  def step(i: jax.Array, leaf: jax.Array) -> jax.Array:
    layer = lax.with_sharding_constraint(leaf[i], inside)
    # An axis of length 1 has the order of all layers.
    own = order if order.ndim == 1 else order[jnp.minimum(i, len(order) - 1)]
    moved = _reordered_at_once(layer, own, axis - 1, inside)
    return lax.with_sharding_constraint(leaf.at[i].set(moved), place)

  return lax.fori_loop(0, leaf.shape[0], step, leaf)


def _reordered_at_once(
  leaf: jax.Array, order: jax.Array, axis: int, place: NamedSharding
) -> jax.Array:
  turned = lax.with_sharding_constraint(
    leaf, _cut_elsewhere(place, leaf.shape, axis)
  )
  take = jnp.take if order.ndim == 1 else jnp.take_along_axis
  taken = take(turned, order, axis, mode="clip")
  return lax.with_sharding_constraint(taken, place)


_take = jax.jit(_reordered, static_argnums=(2, 3))
_take_in_place = jax.jit(_reordered, static_argnums=(2, 3), donate_argnums=0)


def _cut_elsewhere(
  place: NamedSharding, shape: tuple[int, ...], axis: int
) -> Sharding:
  """Returns a sharding that leaves an axis whole."""
  cuts = _cuts(place, len(shape))
  cut, cuts[axis] = cuts[axis], None
  names = cut if isinstance(cut, tuple) else (cut,) if cut else ()
  num_parts = int(np.prod([place.mesh.shape[name] for name in names]))
  free = [
    (size, other)
    for other, size in enumerate(shape)
    if other != axis and cuts[other] is None and size % num_parts == 0
  ]
  if free:
    cuts[max(free)[1]] = cut
  return place.update(spec=PartitionSpec(*cuts))


def _cuts(place: NamedSharding, rank: int) -> list[Any]:
  """Returns the axes of the mesh that cut each axis of a leaf, or None."""
  cuts: list[Any] = list(place.spec)
  return cuts + [None] * (rank - len(cuts))

"""Arrays that are spread over devices, and are not to be gathered on the host.

`np.asarray` of such an array would keep a copy on the host as long as it lives.
"""

import functools
import types
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


def numpy_of(leaf: Any) -> types.ModuleType:
  """Returns `jax.numpy` for a spread leaf, which stays, and NumPy for others.

  So sums of a leaf need no program but where the leaf cannot be here.
  """
  return jnp if is_spread(leaf) else np


def to_host(leaf: Array) -> np.ndarray:
  """Returns a leaf on the host, where nothing is kept of a spread one."""
  return np.asarray(jnp.copy(leaf) if is_spread(leaf) else leaf)


def take(leaf: Array, order: np.ndarray, axis: int) -> Array:
  """Returns the entries of a leaf in another order along an axis.

  The order is [n], or has as many axes as the leaf, of its lengths or 1, where
  it differs along them. The leaf stays where it is. A device that has a part of
  this axis gets instead a part of another one for the time, if one can be cut.
  """
  if is_spread(leaf):
    place = leaf.sharding
    if isinstance(place, NamedSharding) and _is_auto(place):
      return _take(leaf, order, axis, place)
    on_host = np.take if order.ndim == 1 else np.take_along_axis
    return jax.device_put(on_host(to_host(leaf), order, axis), place)
  # The method, so that NumPy leaves stay NumPy and nothing is compiled.
  return leaf.take(order, axis=axis)


def _is_auto(place: NamedSharding) -> bool:
  return all(kind == AxisType.Auto for kind in place.mesh.axis_types)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _take(
  leaf: jax.Array, order: jax.Array, axis: int, place: NamedSharding
) -> jax.Array:
  turned = lax.with_sharding_constraint(
    leaf, _cut_elsewhere(place, leaf.shape, axis)
  )
  take = jnp.take if order.ndim == 1 else jnp.take_along_axis
  taken = take(turned, order, axis, mode="clip")
  return lax.with_sharding_constraint(taken, place)


def _cut_elsewhere(
  place: NamedSharding, shape: tuple[int, ...], axis: int
) -> Sharding:
  """Returns a sharding that leaves an axis whole."""
  cuts = [*place.spec, *[None] * (len(shape) - len(place.spec))]
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

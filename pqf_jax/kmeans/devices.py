"""Programs for one device, and for several that have data of their own.

A jitted function is compiled anew for every device that it runs on. Here all
devices run the same program at the same time: arrays have a leading axis, of
which each device holds one entry, and nothing is exchanged.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pqf_jax import nvidia

PyTree = Any


def on_one(
  platform: str | None,
  function: Callable[..., Any],
  *arguments: PyTree,
  **settings: Hashable,
) -> Any:
  """Calls a jitted function, compiled in less time if it is for a GPU.

  Args:
    platform: as of `batching.platform_of`; None if jax may trace: a program
      that another calls cannot have compiler options of its own.
    function: whose settings are static.
    *arguments: trees of arrays.
    **settings: constants of the program.
  """
  if platform == "cuda":
    function = _without_trials(function, tuple(settings))
  return function(*arguments, **settings)


@functools.cache
def _without_trials(
  function: Callable[..., Any], static: tuple[str, ...]
) -> Callable[..., Any]:
  return jax.jit(
    inspect.unwrap(function),
    static_argnames=static,
    compiler_options=nvidia.NO_TRIALS,
  )


def stack(trees: Sequence[PyTree], mesh: Mesh) -> PyTree:
  """Joins trees of equal shapes, one for each device, along a leading axis.

  Args:
    trees: of arrays on the host or on any device.
    mesh: as many devices; each gets its own tree only.
  """
  placement = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

  def join(*leaves: Any) -> jax.Array:
    parts = [
      jax.device_put(leaf[None], device)
      for leaf, device in zip(leaves, mesh.devices.flat, strict=True)
    ]
    shape = len(parts), *parts[0].shape[1:]
    return jax.make_array_from_single_device_arrays(shape, placement, parts)

  return jax.tree.map(join, *trees)


def unstack(tree: PyTree, mesh: Mesh) -> list[PyTree]:
  """Undoes `stack`: returns the tree of each device, all on the first one."""
  return _split(jax.device_put(tree, mesh.devices.flat[0]), count=mesh.size)


@functools.partial(jax.jit, static_argnames="count")
def _split(tree: PyTree, *, count: int) -> list[PyTree]:
  def take(index: int) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[index], tree)

  return [take(index) for index in range(count)]


def on_each(
  mesh: Mesh,
  function: Callable[..., Any],
  *arguments: PyTree,
  **settings: Hashable,
) -> Any:
  """Calls a function on each device with that device's entries.

  Args:
    mesh: the devices.
    function: of trees of arrays, traceable by JAX.
    *arguments: trees of arrays with a leading axis of the devices.
    **settings: constants of the program, the same on each.

  Returns:
    The results, stacked along a leading axis that is spread like `stack`'s.
  """
  return _program(mesh, function, tuple(settings.items()))(*arguments)


@functools.cache
def _program(
  mesh: Mesh,
  function: Callable[..., Any],
  settings: tuple[tuple[str, Hashable], ...],
) -> Callable[..., Any]:
  def run(*arguments: PyTree) -> Any:
    own = jax.tree.map(lambda leaf: leaf[0], arguments)
    result = function(*own, **dict(settings))
    return jax.tree.map(lambda leaf: leaf[None], result)

  one_entry = PartitionSpec(mesh.axis_names)
  return jax.jit(
    jax.shard_map(
      run,
      mesh=mesh,
      in_specs=one_entry,
      out_specs=one_entry,
      check_vma=False,  # there is nothing to exchange
    )
  )

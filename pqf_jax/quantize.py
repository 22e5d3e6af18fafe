"""Stage 2: quantizes kernels to `VQArray`s, by annealed k-means in batches."""

import functools
import math
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import sharding

from pqf_jax import errors, kmeans
from pqf_jax.core import blocks, spread, trees, vq_array
from pqf_jax.core import plan as plans
from pqf_jax.kmeans import batching, devices

PyTree = Any

# Weights of the layers that share a batch; a single layer may have more. 25
# million need about 1 GB on the device.
_MOST_WEIGHTS = 1 << 25
# The same where each device has its share of a network, beside which there is
# room for one batch of so many.
_MOST_OF_SPREAD = 1 << 24
_TINY = float(np.finfo(np.float32).tiny)
# Of a kernel's largest weight: beyond, float32 loses squares or small weights.
_LARGEST_WEIGHT = 1e-15, 1e12


class LayerSummary(NamedTuple):
  """Error of quantizing one kernel.

  Attributes:
    path: of the kernel.
    distortion: mean squared error of a weight over the kernel's variance, each
      averaged over stacked layers; 0 is lossless, 1 as bad as replacing every
      weight by the mean.
    distortion_by_step: [steps] mean squared error of a sub-vector at each
      k-means step, averaged likewise.
  """

  path: str
  distortion: float
  distortion_by_step: np.ndarray


def quantize_params(
  key: jax.Array,
  variables: PyTree,
  plan: plans.CompressionPlan,
  *,
  annealed: bool = True,
  mesh: sharding.Mesh | None = None,
  on_layer: Callable[[LayerSummary], None] = lambda summary: None,
) -> tuple[PyTree, dict[str, LayerSummary]]:
  """Learns a codebook and codes for every kernel of the plan.

  Section 3.3 of arXiv 2010.15703 (SR-C). A layer's result depends on the key,
  its path, its place in a stack and its weights only, not on the other layers.
  Layers with the same (D, K, steps) run as one program, up to 2^25 weights of
  them; programs are compiled side by side. Where several such batches have the
  same shapes, each device takes one, and all run one compiled program.

  Args:
    key: random number generator key, consumed.
    variables: dense variable tree.
    plan: which kernels, and how.
    annealed: False runs plain k-means (Lloyd), for comparison.
    mesh: devices of this process that share the work, with the same result: a
      layer of more than 2^25 weights is spread over them. None: the devices
      over which the kernels are spread, or else one. Spread kernels leave room
      for one batch at a time, of up to 2^24 weights.
    on_layer: called once for each layer, for progress.

  Returns:
    (variables with `VQArray`s, {path: LayerSummary}). The codes of a kernel
    that is sharded are sharded along C_out, over the same axes of its mesh.

  Raises:
    InputError: weights that are NaN, infinite, or all too small or too large
      for k-means in float32; before any work.
  """
  vq_array.check_dense(variables)
  flat = trees.flatten(variables)
  for path in plan:
    trees.check_finite(path, flat[path])
    _check_range(path, flat[path])
  layers = {
    path: [
      _Layer(path, place, layer.spec.layer_shape(flat[path].shape))
      for place in range(math.prod(layer.spec.stack_shape(flat[path].shape)))
    ]
    for path, layer in plan.items()
  }
  are_spread = False
  if mesh is None:
    mesh = batching.mesh_of([flat[path] for path in plan])
    are_spread = mesh is not None
  elif mesh.size == 1:
    mesh = None
  most = _MOST_OF_SPREAD if are_spread else _MOST_WEIGHTS
  home = None if mesh is None else mesh.devices.flat[0]
  run = functools.partial(
    _quantize, key, flat, plan, annealed, home, are_spread
  )
  results: dict[tuple[str, int], _Result] = {}
  nodes: dict[str, vq_array.VQArray] = {}
  summaries: dict[str, LayerSummary] = {}

  def keep(done: dict[tuple[str, int], _Result]) -> None:
    results.update(done)
    for path in dict.fromkeys(path for path, _ in done):
      places = [(one.path, one.place) for one in layers[path]]
      if all(place in results for place in places):
        nodes[path], summaries[path] = _join(
          path, flat[path], plan[path].spec, [results.pop(p) for p in places]
        )
        on_layer(summaries[path])

  # A large layer is alone in its batch. One at a time: devices that communicate
  # must all get their programs in the same order.
  small = []
  for batch in _batches(layers, plan, most):
    if mesh is not None and batch[0].size > most:
      keep(run(_Round([batch], mesh, threading.Lock(), is_spread=True)))
    else:
      small.append(batch)
  rounds = list(_rounds(small, flat, plan, mesh, one_at_a_time=are_spread))
  with futures.ThreadPoolExecutor(max(1, len(rounds))) as pool:
    submitted = [pool.submit(run, one) for one in rounds]
    for future in futures.as_completed(submitted):
      keep(future.result())
  return trees.replace(variables, nodes), {
    path: summaries[path] for path in plan
  }


class _Layer(NamedTuple):
  """One layer: a kernel, or the part of a stack at this place."""

  path: str
  place: int
  shape: tuple[int, ...]

  @property
  def size(self) -> int:
    return math.prod(self.shape)


class _Result(NamedTuple):
  """What k-means gives for one layer; see `kmeans.KMeansResult`."""

  codebook: jax.Array
  codes: jax.Array
  distortion: np.ndarray
  variance: float


def _check_range(path: str, kernel: trees.Array) -> None:
  largest = float(spread.reduce(_largest, kernel))
  least, most = _LARGEST_WEIGHT
  if largest and not least <= largest <= most:
    raise errors.InputError(
      f"{path} has weights up to {largest:g}; k-means takes {least:g} to "
      f"{most:g}: scale the kernel, or keep it dense (num_codes=None)"
    )


def _largest(numpy: ModuleType, kernel: trees.Array) -> Any:
  return numpy.abs(kernel).max(initial=0)


def _batches(
  layers: Mapping[str, list[_Layer]], plan: plans.CompressionPlan, most: int
) -> Iterator[list[_Layer]]:
  """Yields layers of equal (D, K, steps), of so many weights together."""
  kinds: dict[tuple[int, int, int], list[_Layer]] = {}
  for path, layer in plan.items():
    _, _, length = layer.spec.layout(layers[path][0].shape)
    kind = (length, layer.num_codes, layer.kmeans_steps)
    kinds.setdefault(kind, []).extend(layers[path])
  for kind_layers in kinds.values():
    batch: list[_Layer] = []
    size = 0
    for one in kind_layers:
      if batch and size + one.size > most:
        yield batch
        batch, size = [], 0
      batch.append(one)
      size += one.size
    yield batch


class _Round(NamedTuple):
  """Batches of equal shapes that run at the same time.

  Attributes:
    batches: at most one for each device.
    mesh: the devices; None: the one where the kernels are.
    turn: held while it runs, by each of the rounds of one program or, where
      kernels are spread over devices, by each; so that few kernels are on a
      device at a time.
    is_spread: whether all devices share the only batch.
  """

  batches: list[list[_Layer]]
  mesh: sharding.Mesh | None
  turn: threading.Lock
  is_spread: bool = False


def _rounds(
  batches: Sequence[list[_Layer]],
  flat: Mapping[str, trees.Array],
  plan: plans.CompressionPlan,
  mesh: sharding.Mesh | None,
  *,
  one_at_a_time: bool,
) -> Iterator[_Round]:
  """Divides batches among the devices of the mesh."""
  alike: dict[Any, list[list[_Layer]]] = {}
  for batch in batches:
    shapes = (
      (plan[one.path], one.shape, flat[one.path].dtype) for one in batch
    )
    alike.setdefault(tuple(shapes), []).append(batch)
  turn = threading.Lock()
  for number, some in enumerate(alike.values()):
    if not one_at_a_time:
      turn = threading.Lock()
    if mesh is None:
      yield from (_Round([batch], None, turn) for batch in some)
      continue
    order = mesh.devices.reshape(-1)
    if len(some) == 1:  # on another device for each kind
      order = np.roll(order, -number)
    used = sharding.Mesh(order[: len(some)], ("devices",))
    for first in range(0, len(some), used.size):
      yield _Round(some[first : first + used.size], used, turn)


def _quantize(
  key: jax.Array,
  flat: Mapping[str, trees.Array],
  plan: plans.CompressionPlan,
  annealed: bool,
  home: jax.Device | None,
  to_host: bool,
  one: _Round,
) -> dict[tuple[str, int], _Result]:
  """Quantizes layers of equal (D, K, steps); the results are on `home`.

  Or on the host, where no single device should hold those of all.
  """
  chosen = [plan[layer.path] for layer in one.batches[0]]
  specs = tuple(layer.spec for layer in chosen)
  settings: dict[str, Any] = {
    "num_codes": chosen[0].num_codes,
    "num_steps": chosen[0].kmeans_steps,
    "annealed": annealed,
    "donate": True,
  }

  def load(batch: list[_Layer]) -> _Loaded:
    kernels = (
      spread.own(spec.take_layer(flat[layer.path], layer.place))
      for layer, spec in zip(batch, specs, strict=True)
    )
    return _keys(key, batch, specs), tuple(kernels)

  with one.turn:
    loaded = [load(batch) for batch in one.batches]
    if one.mesh is None or one.is_spread:
      fits = [_fit(*loaded[0], specs, None, mesh=one.mesh, **settings)]
    else:
      fits = _fit_together(loaded, specs, one.mesh, settings)
    fits = jax.device_put(fits, home)
    shapes = tuple(layer.shape for layer in one.batches[0])
    code_dtype = vq_array.code_dtype(chosen[0].num_codes)
    found = {}
    for batch, results in zip(one.batches, fits, strict=True):
      codes = [result.codes for result in results]
      codes = devices.on_one(
        batching.platform_of(codes),
        _to_codes,
        codes,
        specs=specs,
        shapes=shapes,
        dtype=code_dtype,
      )
      # One transfer for all layers; it also waits for them.
      lost = jax.device_get([(r.distortion, r.variance) for r in results])
      for i, layer in enumerate(batch):
        codebook = results[i].codebook.astype(flat[layer.path].dtype)
        found[layer.path, layer.place] = _Result(codebook, codes[i], *lost[i])
    return jax.device_get(found) if to_host else found


_Loaded = tuple[jax.Array, tuple[trees.Array, ...]]
"""Keys and kernels of a batch."""


def _fit(
  keys: jax.Array,
  kernels: tuple[trees.Array, ...],
  specs: tuple[blocks.BlockSpec, ...],
  device: jax.Device | None,
  **settings: Any,
) -> list[kmeans.KMeansResult]:
  """Runs k-means on one batch, which is put on a device, or stays."""
  keys, kernels = jax.device_put((keys, kernels), device)
  platform = batching.platform_of(kernels)
  vectors = devices.on_one(platform, _to_vectors, kernels, specs=specs)
  return kmeans.kmeans_of_layers(keys, vectors, **settings)


def _fit_together(
  loaded: Sequence[_Loaded],
  specs: tuple[blocks.BlockSpec, ...],
  mesh: sharding.Mesh,
  settings: dict[str, Any],
) -> list[list[kmeans.KMeansResult]]:
  """Runs k-means on a batch of each device, by one program for all."""
  results = None
  if mesh.size > 1:
    # Where there are fewer batches, the first once more is cheaper than a
    # program for fewer devices.
    spare = [loaded[0]] * (mesh.size - len(loaded))
    keys, kernels = devices.stack([*loaded, *spare], mesh)
    vectors = devices.on_each(mesh, _to_vectors, kernels, specs=specs)
    del kernels  # their memory serves k-means
    results = kmeans.kmeans_on_each_device(keys, vectors, mesh=mesh, **settings)
  if results is None:
    return [
      _fit(*own, specs, device, **settings)
      for own, device in zip(loaded, mesh.devices.flat, strict=False)
    ]
  return devices.unstack(results, mesh)[: len(loaded)]


def _keys(
  key: jax.Array, batch: list[_Layer], specs: tuple[blocks.BlockSpec, ...]
) -> jax.Array:
  """Returns a key for each layer, by its path and its place in a stack."""
  hashes = [zlib.crc32(layer.path.encode()) for layer in batch]
  fold = jax.vmap(jax.random.fold_in, (None, 0))
  keys = fold(key, np.array(hashes, np.uint32))
  stacked = np.array([bool(spec.stack_axes) for spec in specs])
  if not stacked.any():
    return keys
  places = np.array([layer.place for layer in batch], np.uint32)
  return jnp.where(stacked, jax.vmap(jax.random.fold_in)(keys, places), keys)


def _join(
  path: str, kernel: trees.Array, spec: blocks.BlockSpec, parts: list[_Result]
) -> tuple[vq_array.VQArray, LayerSummary]:
  """Makes one node of a kernel's layers."""

  def stack(leaves: list[jax.Array]) -> jax.Array:
    if not spec.stack_axes:
      return jnp.asarray(leaves[0])
    shape = spec.stack_shape(kernel.shape)
    return jnp.stack(leaves).reshape(*shape, *leaves[0].shape)

  node = vq_array.stack_layers(
    stack([part.codebook for part in parts]),
    stack([part.codes for part in parts]),
    spec.layer_shape(kernel.shape),
    spec,
  )
  by_step = np.mean([part.distortion for part in parts], axis=0)
  # A constant kernel has no variance, and no error either.
  variance = float(np.mean([part.variance for part in parts]))
  length = parts[0].codebook.shape[1]
  distortion = float(by_step[-1]) / length / max(variance, _TINY)
  node = vq_array.shard_like(node, kernel)
  return node, LayerSummary(path, distortion, by_step)


@functools.partial(jax.jit, static_argnums=1)
def _to_vectors(
  kernels: tuple[jax.Array, ...], specs: tuple[blocks.BlockSpec, ...]
) -> tuple[jax.Array, ...]:
  """Cuts each kernel into its sub-vectors [N, D]."""
  cut = [spec.to_blocks(k) for k, spec in zip(kernels, specs, strict=True)]
  return tuple(b.reshape(-1, b.shape[2]) for b in cut)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _to_codes(
  codes: list[jax.Array],
  specs: tuple[blocks.BlockSpec, ...],
  shapes: tuple[tuple[int, ...], ...],
  dtype: jnp.dtype,
) -> list[jax.Array]:
  """Reshapes the codes [N] of each kernel to [C_out, M], in their own type."""
  return [
    c.reshape(spec.layout(shape)[:2]).astype(dtype)
    for c, spec, shape in zip(codes, specs, shapes, strict=True)
  ]

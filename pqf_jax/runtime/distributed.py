"""Runs one program on many processes and devices.

Every process runs the same stages. Variables that pass from stage to stage are
local arrays, equal on all processes. Inside training and evaluation arrays are
global: weights replicated over the mesh, batches sharded along `data`. One
process with one device pays nothing for this.
"""

import functools
import glob
import importlib.metadata
import importlib.util
import json
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax import sharding
from jax.experimental import multihost_utils

from pqf_jax import errors

PyTree = Any
AXIS = "data"
MODES = ("auto", "on", "off")
# A launcher of several processes sets at least one of these.
LAUNCHER_VARIABLES = (
  "JAX_COORDINATOR_ADDRESS",
  "TPU_WORKER_HOSTNAMES",
  "TPU_PROCESS_ADDRESSES",
  "MEGASCALE_COORDINATOR_ADDRESS",
  "SLURM_JOB_ID",
  "OMPI_MCA_orte_hnp_uri",
)
TPU_DEVICES = ("/dev/accel*", "/dev/vfio/*")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def start(mode: str, *, timeout_seconds: int) -> None:
  """Joins the other processes, if there are any; call it before using a device.

  JAX detects TPU pods, Slurm, Kubernetes and Open MPI by itself. Elsewhere set
  JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID.

  Args:
    mode: 'auto' joins where environment variables or TPUs indicate several
      processes; 'on' always joins; 'off' never does.
    timeout_seconds: how long to wait for the other processes.

  Raises:
    InputError: unknown mode, a variable that is no number, or the other
      processes were not reached.
  """
  if mode not in MODES:
    raise errors.InputError(
      f"config.distributed is {mode!r}; it must be one of {MODES}"
    )
  if mode == "off" or jax.distributed.is_initialized():
    return
  names = [name for name in LAUNCHER_VARIABLES if name in os.environ]
  if mode == "auto" and not names and not _has_tpu():
    return
  num_processes = _read_number("JAX_NUM_PROCESSES")
  process_id = _read_number("JAX_PROCESS_ID")
  try:
    jax.distributed.initialize(
      num_processes=num_processes,
      process_id=process_id,
      initialization_timeout=timeout_seconds,
    )
  except (ValueError, RuntimeError) as error:
    variables = ", ".join(f"{name}={os.environ[name]}" for name in names)
    raise errors.InputError(
      f"config.distributed={mode}, but {socket.gethostname()} did not reach "
      f"the other processes ({variables or 'no variable names them'}): "
      f"{str(error).splitlines()[0]}. Start the program on all hosts, open "
      "the coordinator's port (JAX_COORDINATOR_PORT), or give "
      "--config.distributed=off"
    ) from error


def _has_tpu() -> bool:
  # JAX detects Cloud TPUs by their metadata server; no variable names them.
  has_device = any(glob.glob(pattern) for pattern in TPU_DEVICES)
  return has_device and importlib.util.find_spec("libtpu") is not None


def _read_number(variable: str) -> int | None:
  text = os.environ.get(variable)
  if text is None:
    return None
  if not text.isdecimal():
    raise errors.InputError(f"{variable} is {text!r}; it must be a number")
  return int(text)


def banner() -> str:
  """Returns one line that describes this process."""
  devices = jax.local_devices()
  versions = ", ".join(f"{n} {v}" for n, v in package_versions().items())
  return (
    f"process {jax.process_index() + 1} of {jax.process_count()} on "
    f"{socket.gethostname()}: {len(devices)} of {jax.device_count()} "
    f"{devices[0].device_kind} device(s); {versions}"
  )


def package_versions() -> dict[str, str]:
  """Returns {package: version} of the packages that results depend on."""
  return {name: importlib.metadata.version(name) for name in PACKAGES}


def is_lead() -> bool:
  """Whether this is process 0, which alone prints and writes files."""
  return jax.process_index() == 0


def position() -> dict[str, int]:
  """Returns the arguments by which a loader reads this process's images."""
  return {
    "process_index": jax.process_index(),
    "process_count": jax.process_count(),
  }


@functools.cache
def mesh(devices: tuple[jax.Device, ...] | None = None) -> sharding.Mesh:
  """Returns a mesh of one axis over all devices of all processes, or these."""
  count = jax.device_count() if devices is None else len(devices)
  return jax.make_mesh(
    (count,), (AXIS,), axis_types=(sharding.AxisType.Auto,), devices=devices
  )


def replicated(over: sharding.Mesh | None = None) -> sharding.NamedSharding:
  """Returns the sharding that keeps a whole array on every device."""
  return sharding.NamedSharding(over or mesh(), sharding.PartitionSpec())


def sharded(over: sharding.Mesh | None = None) -> sharding.NamedSharding:
  """Returns the sharding that divides rows evenly among the devices."""
  return sharding.NamedSharding(over or mesh(), sharding.PartitionSpec(AXIS))


def replicate(tree: PyTree) -> PyTree:
  """Converts local arrays, equal on all processes, to replicated arrays."""

  def put(leaf: Any) -> jax.Array:
    if getattr(leaf, "sharding", None) == replicated():
      return leaf
    value = np.asarray(leaf)
    return jax.make_array_from_callback(
      value.shape, replicated(), lambda index: value[index]
    )

  return jax.tree.map(put, tree)


def unreplicate(tree: PyTree) -> PyTree:
  """Returns this process's copy of replicated arrays; undoes `replicate`."""
  return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def shard(batch: Mapping[str, Any]) -> dict[str, jax.Array]:
  """Joins the rows [B / processes, ...] of each process to a global batch."""
  return {
    name: jax.make_array_from_process_local_data(sharded(), np.asarray(rows))
    for name, rows in batch.items()
  }


def divide_work(costs: Mapping[str, float]) -> list[list[str]]:
  """Divides work {name: cost} evenly; returns the names by process."""
  names: list[list[str]] = [[] for _ in range(jax.process_count())]
  loads = [0.0] * len(names)
  for name in sorted(costs, key=lambda name: -costs[name]):
    process = loads.index(min(loads))
    names[process].append(name)
    loads[process] += costs[name]
  return names


def gather_trees(
  names: Sequence[Sequence[str]],
  local_trees: Mapping[str, PyTree],
  shapes: Mapping[str, PyTree],
) -> dict[str, PyTree]:
  """Gathers trees of arrays that the processes computed, on all processes.

  Args:
    names: by process, see `divide_work`.
    local_trees: {name: tree of arrays}, with at least this process's names.
    shapes: {name: the tree with `jax.ShapeDtypeStruct`s} of all names.
  """
  gathered: dict[str, PyTree] = {}
  for process, names_there in enumerate(names):
    is_source = process == jax.process_index()
    if is_source:
      trees = {name: local_trees[name] for name in names_there}
    else:
      trees = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype),
        {name: shapes[name] for name in names_there},
      )
    if jax.process_count() > 1 and names_there:
      trees = multihost_utils.broadcast_one_to_all(trees, is_source=is_source)
    gathered |= trees
  return gathered


def gather_records(record: Mapping[str, Any]) -> dict[str, Any]:
  """Gathers the JSON records of all processes in one."""
  return {k: v for other in _gather_json(record) for k, v in other.items()}


def gather_lists(items: Sequence[Any]) -> list[Any]:
  """Gathers the JSON lists of all processes in one, in their order."""
  return [item for other in _gather_json(items) for item in other]


def barrier(name: str) -> None:
  """Waits until every process calls this."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def check_agreement(facts: Mapping[str, Any]) -> None:
  """Refuses processes that were started differently.

  Args:
    facts: {name: JSON data} that must be the same everywhere.

  Raises:
    InputError: names what differs, with the values of two processes.
  """
  first, *others = _gather_json(facts)
  differences = [
    f"{name} is {first[name]!r} on process 0 and {other[name]!r} on {index}"
    for index, other in enumerate(others, 1)
    for name in facts
    if other[name] != first[name]
  ]
  if differences:
    raise errors.InputError(
      f"the processes were started differently: {'; '.join(differences)}; give "
      "all of them the same config, code and packages"
    )


def check_shared(token_file: epath.Path) -> None:
  """Refuses a workdir that only some of the hosts see.

  Args:
    token_file: a file in the workdir that process 0 has just written.

  Raises:
    InputError: some process does not see the file.
  """
  if jax.process_count() == 1:
    return
  barrier("token written")
  sees = _gather_rows(np.array([token_file.exists()], np.int32)).reshape(-1)
  if not sees.all():
    blind = ", ".join(map(str, np.flatnonzero(sees == 0)))
    raise errors.InputError(
      f"the workdir {token_file.parent} is not on storage that all hosts "
      f"share: process(es) {blind} do not see what process 0 wrote there; "
      "give --workdir on a shared disk or a bucket (gs://...)"
    )


def check_batch_size(
  name: str, batch_size: int, num_devices: int, microbatches: int = 1
) -> None:
  """Refuses a batch that the devices cannot share evenly.

  Args:
    name: of the setting, for the error.
    batch_size: images of all devices.
    num_devices: of all processes.
    microbatches: parts that each device divides its images into.

  Raises:
    InputError: names the setting and the nearest sizes that fit.
  """
  unit = num_devices * microbatches
  if batch_size % unit:
    below = batch_size // unit * unit
    sizes = " or ".join(str(n) for n in (below, below + unit) if n)
    parts = f" in {microbatches} microbatches" if microbatches > 1 else ""
    raise errors.InputError(
      f"{name} is {batch_size}, which {num_devices} devices cannot share "
      f"evenly{parts}; choose {sizes}"
    )


def _gather_json(value: Any) -> list[Any]:
  """Returns the JSON data of every process, in their order."""
  text = json.dumps(value).encode()
  longest = int(_gather_rows(np.array([len(text)], np.int32)).max())
  padded = np.frombuffer(text.ljust(longest), np.uint8)
  return [json.loads(bytes(row)) for row in _gather_rows(padded)]


def _gather_rows(row: np.ndarray) -> np.ndarray:
  """Returns the rows of all processes, [processes, ...]."""
  if jax.process_count() == 1:
    return row[None]
  gathered = multihost_utils.process_allgather(row)
  return np.asarray(gathered).reshape(jax.process_count(), -1)

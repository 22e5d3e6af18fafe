"""One program on many processes and devices: start, arrays, agreement.

Every process runs the same stages. What travels between stages is local to the
process and equal on all of them; inside training and evaluation arrays are
global: weights replicated over the mesh, batches sharded along `data`. On one
process with one device all of this costs nothing.
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
from jax import sharding
from jax.experimental import multihost_utils

from pqf_jax import errors

PyTree = Any
AXIS = "data"
MODES = ("auto", "on", "off")
# Any of these says that this process is one of several.
CLUSTER_VARIABLES = (
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
  """Joins the other processes, if there are any; before any device is used.

  JAX finds TPU pods, Slurm, Kubernetes and Open MPI by itself. Elsewhere set
  JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID.

  Args:
    mode: 'auto' joins where the environment names a cluster or holds TPUs;
      'on' insists; 'off' does not look.
    timeout_seconds: how long to wait for the others.

  Raises:
    InputError: unknown mode, or the cluster was not reached.
  """
  if mode not in MODES:
    raise errors.InputError(
      f"config.distributed is {mode!r}; it must be one of {MODES}"
    )
  if mode == "off" or jax.distributed.is_initialized():
    return
  signs = [name for name in CLUSTER_VARIABLES if name in os.environ]
  if mode == "auto" and not signs and not _on_tpu():
    return
  try:
    jax.distributed.initialize(
      num_processes=_number("JAX_NUM_PROCESSES"),
      process_id=_number("JAX_PROCESS_ID"),
      initialization_timeout=timeout_seconds,
    )
  except (ValueError, RuntimeError) as error:
    found = ", ".join(f"{name}={os.environ[name]}" for name in signs)
    raise errors.InputError(
      f"config.distributed={mode}, but the cluster was not reached from "
      f"{socket.gethostname()} ({found or 'no variable names one'}): "
      f"{str(error).splitlines()[0]}. Start the program on all hosts, open "
      "the coordinator's port (JAX_COORDINATOR_PORT), or give "
      "--config.distributed=off"
    ) from error


def _on_tpu() -> bool:
  # Cloud TPUs are found by their metadata server, so no variable tells.
  devices = any(glob.glob(pattern) for pattern in TPU_DEVICES)
  return devices and importlib.util.find_spec("libtpu") is not None


def _number(variable: str) -> int | None:
  text = os.environ.get(variable)
  if text is None:
    return None
  if not text.isdecimal():
    raise errors.InputError(f"{variable} is {text!r}; it must be a number")
  return int(text)


def banner() -> str:
  """One line that says what this process is."""
  devices = jax.local_devices()
  versions = ", ".join(f"{n} {v}" for n, v in package_versions().items())
  return (
    f"process {jax.process_index() + 1} of {jax.process_count()} on "
    f"{socket.gethostname()}: {len(devices)} of {jax.device_count()} "
    f"{devices[0].device_kind} device(s); {versions}"
  )


def package_versions() -> dict[str, str]:
  """{package: version} of what decides the result."""
  return {name: importlib.metadata.version(name) for name in PACKAGES}


def is_lead() -> bool:
  """Whether this is the process that writes and speaks."""
  return jax.process_index() == 0


def share() -> dict[str, int]:
  """Which part of every batch this process reads; arguments of the loaders."""
  return {
    "process_index": jax.process_index(),
    "process_count": jax.process_count(),
  }


@functools.cache
def mesh(devices: tuple[jax.Device, ...] | None = None) -> sharding.Mesh:
  """All devices of all processes, or those given, in a row."""
  return jax.make_mesh(
    (jax.device_count() if devices is None else len(devices),),
    (AXIS,),
    axis_types=(sharding.AxisType.Auto,),
    devices=devices,
  )


def replicated(over: sharding.Mesh | None = None) -> sharding.NamedSharding:
  """Every device, of `mesh()` or another one, holds the whole array."""
  place = mesh() if over is None else over
  return sharding.NamedSharding(place, sharding.PartitionSpec())


def sharded(over: sharding.Mesh | None = None) -> sharding.NamedSharding:
  """Every device, of `mesh()` or another one, holds its rows."""
  place = mesh() if over is None else over
  return sharding.NamedSharding(place, sharding.PartitionSpec(AXIS))


def replicate(tree: PyTree) -> PyTree:
  """Global arrays, whole on every device, of local ones that all agree on."""

  def put(leaf: Any) -> jax.Array:
    if getattr(leaf, "sharding", None) == replicated():
      return leaf
    value = np.asarray(leaf)
    return jax.make_array_from_callback(
      value.shape, replicated(), lambda index: value[index]
    )

  return jax.tree.map(put, tree)


def local(tree: PyTree) -> PyTree:
  """This process's copy of replicated arrays; undoes `replicate`."""
  return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def shard(batch: Mapping[str, Any]) -> dict[str, jax.Array]:
  """The global batch, of the rows [B / processes, ...] that each one read."""
  return {
    name: jax.make_array_from_process_local_data(sharded(), np.asarray(rows))
    for name, rows in batch.items()
  }


def divide(costs: Mapping[str, float]) -> list[list[str]]:
  """Names of the tasks of each process, about equally costly together.

  Args:
    costs: {name: cost} of each task.
  """
  shares: list[list[str]] = [[] for _ in range(jax.process_count())]
  loads = [0.0] * len(shares)
  for name in sorted(costs, key=lambda name: -costs[name]):
    owner = loads.index(min(loads))
    shares[owner].append(name)
    loads[owner] += costs[name]
  return shares


def exchange(
  shares: Sequence[Sequence[str]],
  mine: Mapping[str, PyTree],
  shapes: Mapping[str, PyTree],
) -> dict[str, PyTree]:
  """Everybody's results, of which each process computed its share.

  Args:
    shares: names by process; see `divide`.
    mine: {name: tree of arrays}, at least those of this process's share.
    shapes: {name: the tree with `jax.ShapeDtypeStruct`s}.
  """
  found = {}
  for owner, share in enumerate(shares):
    if owner == jax.process_index():
      held = {name: mine[name] for name in share}
    else:
      held = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype),
        {name: shapes[name] for name in share},
      )
    if jax.process_count() > 1 and share:
      held = multihost_utils.broadcast_one_to_all(
        held, is_source=owner == jax.process_index()
      )
    found |= held
  return found


def merge(mine: Mapping[str, Any]) -> dict[str, Any]:
  """The JSON records of all processes in one."""
  return {name: v for told in _tell(mine) for name, v in told.items()}


def collect(mine: Sequence[Any]) -> list[Any]:
  """The JSON lists of all processes in one, in their order."""
  return [item for told in _tell(mine) for item in told]


def barrier(name: str) -> None:
  """Waits until every process has come to this point."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def check_agreement(facts: Mapping[str, Any]) -> None:
  """Refuses processes that were started differently.

  Args:
    facts: {name: JSON data} that must be the same everywhere.

  Raises:
    InputError: names what differs, with the values of two processes.
  """
  told = _tell(facts)
  differences = [
    f"{name} is {told[0][name]!r} on process 0 and {other[name]!r} on {index}"
    for index, other in enumerate(told)
    for name in facts
    if other[name] != told[0][name]
  ]
  if differences:
    raise errors.InputError(
      "the processes were not started alike: " + "; ".join(differences)
    )


def check_shared(folder: os.PathLike[str], token_file: Any) -> None:
  """Refuses a folder that only some of the hosts see.

  Args:
    folder: to be named.
    token_file: an `epath.Path` in it that process 0 has just written.

  Raises:
    InputError: some process does not see the file.
  """
  if jax.process_count() == 1:
    return
  barrier("token written")
  seen = _gather(np.array([token_file.exists()], np.int32)).reshape(-1)
  if not seen.all():
    blind = ", ".join(map(str, np.flatnonzero(seen == 0)))
    raise errors.InputError(
      f"the workdir {os.fspath(folder)} is not on storage that all hosts "
      f"share: process(es) {blind} do not see what process 0 wrote there; "
      "give --workdir on a shared disk or a bucket (gs://...)"
    )


def check_divides(
  name: str, batch_size: int, num_devices: int, microbatches: int = 1
) -> None:
  """Refuses a batch that the devices cannot share evenly.

  Args:
    name: of the setting.
    batch_size: its value.
    num_devices: of all processes.
    microbatches: parts that each device cuts its share into.

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


def _tell(mine: Any) -> list[Any]:
  """What every process says, as JSON data, in order."""
  text = json.dumps(mine).encode()
  longest = int(_gather(np.array([len(text)], np.int32)).max())
  padded = np.frombuffer(text.ljust(longest), np.uint8)
  return [json.loads(bytes(row)) for row in _gather(padded)]


def _gather(row: np.ndarray) -> np.ndarray:
  """[processes, ...] of everybody's row."""
  if jax.process_count() == 1:
    return row[None]
  gathered = multihost_utils.process_allgather(row)
  return np.asarray(gathered).reshape(jax.process_count(), -1)

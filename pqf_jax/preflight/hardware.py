"""Lists the chips that a preflight knows, and opens devices to compile for."""

import importlib.metadata
import importlib.util
import math
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from pqf_jax import errors
from pqf_jax.preflight import gpu_compiler


class Chip(NamedTuple):
  """Peak figures of one chip.

  Attributes:
    peak_flops: multiplications and additions a second, bfloat16.
    float32_flops: the same where a product's inputs are float32 and the
      precision is JAX's default: one bfloat16 pass on a TPU, TF32 on a GPU.
    hbm_bytes: that a program may use.
    hbm_bandwidth: bytes a second.
    link_bandwidth: bytes a second that a chip sends, all its links together.
    num_linked: the most chips that these links join.
    network_bandwidth: bytes a second that a chip sends to others than those; 0
      where there are none.
    num_axes: of the topology, as in 2x4; 0: a number of chips.
  """

  peak_flops: float
  float32_flops: float
  hbm_bytes: float
  hbm_bandwidth: float
  link_bandwidth: float
  num_linked: int
  network_bandwidth: float
  num_axes: int


GIB = 2**30
# TPUs: docs.cloud.google.com/tpu/docs/v5e, /v6e, /v5p (read 2026-11); links are
# half of the "bidirectional inter-chip interconnect bandwidth per chip" (400,
# 800, 1200 GB/s). hbm_bytes: "available HBM" in the message by which libtpu
# 0.0.52 refuses a program. GPUs: NVIDIA's data sheets of the SXM boards,
# without sparsity; NVLink 900 GB/s both ways among 8 (DGX H100/H200), beyond
# them a 400 Gbit/s adapter a GPU.
CHIPS = {
  "v5e": Chip(197e12, 197e12, 15.75 * GIB, 819e9, 200e9, 256, 0, 2),
  "v6e": Chip(918e12, 918e12, 31.24 * GIB, 1640e9, 400e9, 256, 0, 2),
  "v5p": Chip(459e12, 459e12, 95.73 * GIB, 2765e9, 600e9, 6144, 0, 3),
  "h100": Chip(989e12, 495e12, 80e9, 3350e9, 450e9, 8, 50e9, 0),
  "h200": Chip(989e12, 495e12, 141e9, 4800e9, 450e9, 8, 50e9, 0),
}
KNOWN = (
  "v5e:AxB and v6e:AxB such as v5e:2x4 or v6e:16x16, v5p:AxBxC such as "
  "v5p:2x2x1, h100:N and h200:N such as h100:8"
)


class Target(NamedTuple):
  """The hardware that is compiled for.

  Attributes:
    topology: as the user named it.
    chip: figures of one of its chips.
    num_chips: their number.
  """

  topology: str
  chip: Chip
  num_chips: int

  @property
  def is_tpu(self) -> bool:
    """Whether libtpu compiles for it."""
    return self.chip.num_axes > 0

  @property
  def bandwidth(self) -> float:
    """The bytes a second that a chip sends to the others."""
    if self.num_chips > self.chip.num_linked:
      return self.chip.network_bandwidth
    return self.chip.link_bandwidth


def parse(topology: str) -> Target:
  """Parses a name such as 'v5e:2x4' or 'h100:8'.

  Raises:
    InputError: no such topology; lists the known ones.
  """
  match = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)*)", topology)
  chip = CHIPS.get(match[1]) if match else None
  sides = [int(side) for side in match[2].split("x")] if match else []
  if not match or chip is None or len(sides) != max(chip.num_axes, 1):
    raise errors.InputError(
      f"config.topology is {topology!r}; known are {KNOWN}"
    )
  target = Target(topology, chip, math.prod(sides))
  if not target.bandwidth:
    raise errors.InputError(
      f"config.topology {topology} has {target.num_chips} chips; a slice of "
      f"{match[1]} has at most {chip.num_linked}"
    )
  return target


class Devices(NamedTuple):
  """Devices to compile for; none but a CPU could run anything.

  Attributes:
    sizing: devices whose compiler states memory and collectives.
    counting: devices whose compiler counts FLOPs and traffic.
  """

  sizing: tuple[jax.Device, ...]
  counting: tuple[jax.Device, ...]

  @property
  def is_estimate(self) -> bool:
    """Whether XLA's CPU compiler stands for that of the chips."""
    return self.sizing[0].platform == "cpu"


def open_devices(target: Target) -> Devices:
  """Opens devices to compile for.

  Call it before JAX has used any device: for GPUs it makes as many devices of
  the host, since a GPU's own compiler, where installed, counts no FLOPs.

  Raises:
    InputError: libtpu is not installed, or has no such slice.
  """
  # An accelerator of the host must not be taken.
  jax.config.update("jax_platforms", "cpu")
  if target.is_tpu:
    devices = _open_tpus(target)
    return Devices(devices, devices)
  jax.config.update("jax_num_cpu_devices", target.num_chips)
  hosts = tuple(jax.devices("cpu"))
  if not gpu_compiler.is_installed():
    return Devices(hosts, hosts)
  devices = gpu_compiler.open_devices(
    target.topology,
    target.num_chips,
    memory_bytes=target.chip.hbm_bytes,
    bandwidth=target.chip.hbm_bandwidth,
    devices_per_host=target.chip.num_linked,
  )
  return Devices(devices, hosts)


def _open_tpus(target: Target) -> tuple[jax.Device, ...]:
  _check_libtpu(target.topology)
  # libtpu would ask the cloud's metadata server, which a laptop lacks.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  # Its lock protects chips, and there are none.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  try:
    description = topologies.get_topology_desc(
      platform="tpu", topology_name=target.topology
    )
  except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
    reason = str(error).splitlines()[0]
    raise errors.InputError(
      f"config.topology={target.topology} is not available: {reason}; known "
      f"are {KNOWN}"
    ) from error
  return tuple(description.devices)


def _check_libtpu(topology: str) -> None:
  """Refuses a libtpu that does not belong to this jax, or none.

  jaxlib 0.10.2 aborts on some programs of libtpu 0.0.52.
  """
  stated = " ".join(importlib.metadata.requires("jax") or ())
  match = re.search(r"\blibtpu==([\d.]*\d)(\.\*)?", stated)
  install = f'pip install "{match[0]}"' if match else "pip install libtpu"
  if importlib.util.find_spec("libtpu") is None:
    raise errors.InputError(
      f"config.topology={topology} needs the compiler of TPUs, which itself "
      f"runs without one: {install}"
    )
  held = importlib.metadata.version("libtpu")
  if match and not f"{held}.".startswith(f"{match[1]}."):
    raise errors.InputError(
      f"libtpu is {held}, but jax {jax.__version__} needs {match[0]}: {install}"
    )

"""Opens XLA's compiler for NVIDIA GPUs on a machine without a GPU.

It comes with jax's CUDA plugin and takes a description of a GPU. The memory
that it states is right: a fine-tuning step of ResNet-50 with 128 images needs
10,710,448,960 B by it and 10,712,018,756 B on an H100 (jax 0.10.2 and 0.11.2).
"""

import importlib.util
import math

import jax
from jax.experimental import topologies

PLUGIN = "jax_plugins.xla_cuda13"
# Figures that all Hopper boards share: NVIDIA's H100 data sheet, and the limits
# of compute capability 9.0 in the CUDA programming guide.
_HOPPER = """
gpu_device_info {{
  name: "{name}"
  device_memory_size: {memory:.0f}
  memory_bandwidth: {bandwidth:.0f}
  cuda_compute_capability {{ major: 9 }}
  core_count: 132
  clock_rate_ghz: 1.98
  fpus_per_core: 128
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""


def is_installed() -> bool:
  """Tells whether jax's CUDA plugin is installed."""
  try:
    return importlib.util.find_spec(PLUGIN) is not None
  except ModuleNotFoundError:  # no plugin of any kind
    return False


def installation() -> str:
  """Returns the command that installs the plugin."""
  version = jax.__version__
  return (
    f'pip install "jax-cuda13-plugin=={version}" "jax-cuda13-pjrt=={version}"'
  )


def open_devices(
  name: str,
  num_devices: int,
  *,
  memory_bytes: float,
  bandwidth: float,
  devices_per_host: int,
) -> tuple[jax.Device, ...]:
  """Opens Hopper GPUs to compile for; none of them can run anything.

  Args:
    name: of the board.
    num_devices: number of GPUs.
    memory_bytes: memory of a GPU.
    bandwidth: of its memory, bytes a second.
    devices_per_host: the most GPUs that one host has.
  """
  on_host = math.gcd(num_devices, devices_per_host)
  description = topologies.get_topology_desc(
    platform="cuda",
    topology_name="",
    target_config=_HOPPER.format(
      name=name, memory=memory_bytes, bandwidth=bandwidth
    ),
    topology=f"1x{num_devices // on_host}x{on_host}",
  )
  return tuple(description.devices)

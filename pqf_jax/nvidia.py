"""The NVIDIA GPUs that kernels of ours are written for: Hopper and later."""

import functools

import jax

FIRST_JAX = (0, 11)
"""The first version of jax whose Mosaic GPU functions have our arguments."""

# An H100 or H200 has so many processors, and so much shared memory in each,
# less what Mosaic takes.
NUM_PROCESSORS = 132
SHARED_BYTES = 232448 - 4096


@functools.cache
def is_available() -> bool:
  """Returns whether this process has such a GPU, and a jax that can use it."""
  if jax.__version_info__ < FIRST_JAX:
    return False
  try:
    devices = jax.local_devices(backend="cuda")
  except RuntimeError:
    return False
  return all(float(d.compute_capability) >= 9 for d in devices)

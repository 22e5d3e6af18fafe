"""The NVIDIA GPUs that kernels of ours are written for: Hopper and later."""

import functools

import jax

FIRST_JAX = (0, 11)
"""The first version of jax whose Mosaic GPU functions have our arguments."""

# An H100 or H200 has so many processors, and so much shared memory in each,
# less what Mosaic takes.
NUM_PROCESSORS = 132
SHARED_BYTES = 232448 - 4096

NO_TRIALS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}
"""`compiler_options` of programs that take longer to compile than to run: XLA
then does not try several kernels for a product, its own and NVIDIA's."""


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

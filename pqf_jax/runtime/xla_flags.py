"""Sets the flags with which XLA compiles this library to faster programs.

main.py does so. A program of your own calls it before jax uses its devices:

    from pqf_jax.runtime import xla_flags

    xla_flags.set_defaults()
"""

import os

FLAGS = (
  # jaxlib 0.10.2 to 0.11.0 compile a float32 scatter-add (the gradient of an
  # indexed read) into a compare-and-swap loop on NVIDIA, 450 to 2,000 times
  # slower; this restores the hardware's atomic addition. K-means and the
  # codebook gradient add integers and do not need it.
  "--xla_gpu_ftz=true",
  # XLA uses half the width of AVX-512 by default. K-means takes 6.3 instead of
  # 8.5 ms a step at N = 262144, D = 9, K = 256, 8.1 instead of 13.4 at N =
  # 128000, D = 4, K = 2048 on two cores of a Zen 5. Nothing changes without
  # AVX-512.
  "--xla_cpu_prefer_vector_width=512",
)


def set_defaults() -> None:
  """Puts the flags before those of XLA_FLAGS, which take precedence."""
  given = os.environ.get("XLA_FLAGS", "")
  os.environ["XLA_FLAGS"] = " ".join((*FLAGS, given)).strip()

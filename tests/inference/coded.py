"""Random compressed kernels for the tests of this folder."""

import jax.numpy as jnp
import numpy as np

from pqf_jax.core import blocks, vq_array


def make_kernel(seed, shape, *, num_codes, channels=None, spec=None, stack=()):
  """Returns a `VQArray` of this dense shape, its weights of variance 1/C_in."""
  spec = spec or blocks.BlockSpec(channels)
  c_out, m, length = spec.layout(shape)
  rng = np.random.default_rng(seed)
  codebook = rng.standard_normal((*stack, num_codes, length))
  codes = rng.integers(0, num_codes, (*stack, c_out, m))
  return vq_array.VQArray(
    jnp.array(codebook / np.sqrt(m * length), jnp.float32),
    jnp.array(codes, vq_array.code_dtype(num_codes)),
    shape,
    spec,
  )

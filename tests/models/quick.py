"""Compilation of networks that run a few times only."""

import functools

import jax

# A third of the time and of the memory, for slower programs.
jit = functools.partial(
  jax.jit,
  compiler_options={
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
  },
)

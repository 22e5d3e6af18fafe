"""Runs `python -m pqf_jax.data.prepare`."""

import sys

import jax

from pqf_jax.data.prepare import command

# Progress asks JAX for its process index; on CPU this neither takes an
# accelerator nor waits for the other hosts of a pod.
jax.config.update("jax_platforms", "cpu")
sys.exit(command.main(sys.argv[1:]))

"""Runs `python -m pqf_jax.data.prepare`."""

import sys

import jax

from pqf_jax.data.prepare import command

# Progress asks JAX for the process: not to take an accelerator, or wait for
# the other hosts of a pod.
jax.config.update("jax_platforms", "cpu")
sys.exit(command.main(sys.argv[1:]))

"""Compiles a recipe for hardware that is not here, and counts what it needs."""

from pqf_jax.preflight.preflight import run as run

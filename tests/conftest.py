"""Strict numerics for every test, and the optional folder of real data."""

import os
import pathlib

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def shared_data() -> pathlib.Path:
  """Real images and weights; the test is skipped where they are absent."""
  folder = os.environ.get("PQF_JAX_SHARED")
  if not folder:
    pytest.skip("PQF_JAX_SHARED names no folder of real data")
  return pathlib.Path(folder) / "data"

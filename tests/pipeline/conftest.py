import sys

import jax
import ml_collections
import pytest

from tests.pipeline import tiny


@pytest.fixture(autouse=True)
def _tiny_architecture(monkeypatch):
  module = tiny.architecture()
  monkeypatch.setitem(sys.modules, module.__name__, module)
  monkeypatch.setattr(
    "pqf_jax.models.get_model",
    lambda name: sys.modules[f"pqf_jax.models.{name}"],
  )
  # The training stack multiplies floats by integer steps.
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


@pytest.fixture
def config() -> ml_collections.ConfigDict:
  return tiny.get_config()

import jax
import ml_collections
import pytest

from pqf_jax import models
from tests.pipeline import tiny


@pytest.fixture(autouse=True)
def _tiny_model():
  models.register("tiny", "tests.pipeline.tiny")
  # The training stack multiplies floats by integer steps.
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


@pytest.fixture
def config() -> ml_collections.ConfigDict:
  return tiny.get_config()

import numpy as np
import pytest

from pqf_jax import errors, pack
from pqf_jax.core import blocks, trees, vq_array
from pqf_jax.pipeline import weights

ONES = np.ones(8, np.float32)
STATISTICS = {"mean": ONES, "var": ONES}
NETWORK = {
  "params": {
    "conv": {"kernel": np.ones((8, 8), np.float32)},
    **{norm: {"scale": ONES, "bias": ONES} for norm in ("bn0", "bn1")},
  },
  "batch_stats": {"bn0": STATISTICS, "bn1": STATISTICS},
}
COMPRESSED = trees.replace(
  NETWORK,
  {
    "params/conv/kernel": vq_array.VQArray(
      np.ones((2, 2), np.float32),
      np.zeros((8, 4), np.uint8),
      (8, 8),
      blocks.BlockSpec(2),
    )
  },
)


def read(path, epsilon):
  shapes = trees.shapes(NETWORK)
  return weights.read(str(path), "any", shapes, norm_epsilon=epsilon)


@pytest.mark.parametrize("saved", [1e-3, {"bn0": 1e-5, ".*": 1e-3}])
def test_norms_folded_for_another_epsilon_are_refused(tmp_path, saved):
  path = tmp_path / "net.safetensors"
  pack.save(path, COMPRESSED, norm_epsilon=saved)
  with pytest.raises(
    errors.InputError, match="for epsilon 0.001, but .* 1e-05"
  ):
    read(path, 1e-5)


def test_those_of_the_network_and_statistics_are_read(tmp_path):
  path = tmp_path / "net.safetensors"
  pack.save(path, COMPRESSED, norm_epsilon=1e-3)
  mean = read(path, 1e-3)["batch_stats"]["bn0"]["mean"]
  np.testing.assert_array_equal(mean, 0 * ONES)
  pack.save(path, NETWORK)
  mean = read(path, 1e-3)["batch_stats"]["bn0"]["mean"]
  np.testing.assert_array_equal(mean, ONES)

"""The predicted distortion, against k-means itself."""

import numpy as np
import pytest

from pqf_jax.allocation import distortion
from pqf_jax.core import blocks

RNG = np.random.default_rng(0)


def lloyd(vectors: np.ndarray, num_codes: int) -> float:
  """Returns the mean squared error of a sub-vector after a careful start."""
  rng = np.random.default_rng(0)
  codebook = vectors[:1]
  while len(codebook) < num_codes:  # k-means++
    far = np.square(vectors[:, None] - codebook).sum(2).min(1)
    codebook = np.vstack(
      [codebook, vectors[rng.choice(len(far), p=far / far.sum())]]
    )
  for _ in range(40):
    codes = np.square(vectors[:, None] - codebook).sum(2).argmin(1)
    for code in set(codes):
      codebook[code] = vectors[codes == code].mean(0)
  return np.square(vectors - codebook[codes]).sum(1).mean()


def test_tree_finds_clusters_that_are_apart():
  corners = np.array([(x, y) for x in (0, 10) for y in (0, 3)], np.float32)
  noise = RNG.normal(size=(4, 50, 2), scale=0.1).astype(np.float32)
  vectors = (corners[:, None] + noise).reshape(-1, 2)
  errors = distortion.tree_errors(RNG.permutation(vectors), 2)
  halves = vectors.reshape(2, 100, 2)
  within = noise - noise.mean(1, keepdims=True)
  wanted = [
    np.square(x - x.mean(-2, keepdims=True)).sum(-1).mean()
    for x in (vectors, halves, within)
  ]
  np.testing.assert_allclose(errors, wanted, rtol=1e-4)


def test_tree_parts_equal_vectors_no_further():
  vectors = np.repeat(np.eye(3, dtype=np.float32), 20, 0)
  errors = distortion.tree_errors(vectors, 5)
  assert errors[0] == pytest.approx(2 / 3)
  np.testing.assert_allclose(errors[2:], 0, atol=1e-12)


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("channels", [2, 8])
def test_prediction_is_near_kmeans(heavy: bool, channels: int):
  kernel = RNG.normal(size=(32, 96)).astype(np.float32)
  if heavy:  # some outputs matter much more
    kernel *= np.exp(RNG.normal(size=96)).astype(np.float32)
  spec = blocks.BlockSpec(channels)
  predicted = distortion.predict_distortions(kernel, spec, 6)
  vectors = np.asarray(spec.to_blocks(kernel)).reshape(-1, channels)
  for bits in (2, 4, 6):
    found = lloyd(vectors, 2**bits) / channels / kernel.var()
    assert predicted[bits] == pytest.approx(found, rel=0.2), bits


def test_prediction_is_of_any_scale_and_a_constant_loses_nothing():
  kernel = RNG.normal(size=(8, 32)).astype(np.float32)
  spec = blocks.BlockSpec(2)
  once = distortion.predict_distortions(kernel, spec, 5)
  for scale in (1e-30, 1024, 1e30):
    scaled = distortion.predict_distortions(np.float32(scale) * kernel, spec, 5)
    np.testing.assert_allclose(once, scaled, rtol=1e-4)
  assert (np.diff(once) <= 0).all()
  nothing = distortion.predict_distortions(np.ones_like(kernel), spec, 5)
  np.testing.assert_array_equal(nothing, np.zeros(6))


def test_a_sample_stands_for_a_large_kernel(monkeypatch: pytest.MonkeyPatch):
  kernel = RNG.normal(size=(64, 128)).astype(np.float32)
  spec = blocks.BlockSpec(4)
  whole = distortion.predict_distortions(kernel, spec, 6)
  monkeypatch.setattr(distortion, "_MOST_VECTORS", 1024)
  sample = distortion.predict_distortions(kernel, spec, 6)
  np.testing.assert_allclose(sample, whole, rtol=0.1)

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pqf_jax.models.mask_rcnn import boxes as box_ops
from pqf_jax.models.mask_rcnn import matching


def draw_boxes(rng, count):
  """Draws boxes on a coarse raster, so that overlaps are often equal."""
  corner = rng.integers(0, 8, (count, 2))
  return np.concatenate(
    [corner, corner + rng.integers(1, 6, (count, 2))], axis=1
  ).astype(np.float32)


iou_matrix = jax.jit(box_ops.iou_matrix)
match = jax.jit(
  matching.match, static_argnames=("low", "high", "allow_low_quality")
)
sample = jax.jit(
  functools.partial(matching.sample, num_samples=12, max_positive=5)
)


@pytest.mark.parametrize("allow_low_quality", [False, True])
@pytest.mark.parametrize("limits", [(0.3, 0.7), (0.5, 0.5)])
def test_matches_follow_the_rules_candidate_by_candidate(
  allow_low_quality, limits
):
  low, high = limits
  for seed in range(5):
    rng = np.random.default_rng(seed)
    objects, candidates = draw_boxes(rng, 5), draw_boxes(rng, 30)
    exists = np.arange(5) < rng.integers(0, 6)
    usable = rng.random(30) < 0.9
    matches = match(
      objects,
      exists,
      candidates,
      usable,
      low=low,
      high=high,
      allow_low_quality=allow_low_quality,
    )
    index, positive, negative = jax.device_get(matches)
    overlap = np.asarray(iou_matrix(objects, candidates))[exists]
    for n in range(30):
      column = overlap[:, n]
      best = column.max(initial=-1)
      is_best = allow_low_quality and any(
        column[g] == overlap[g].max() for g in range(len(overlap))
      )
      is_matched = best >= np.float32(high) or is_best
      assert positive[n] == (usable[n] and is_matched)
      is_background = best < np.float32(low) and not is_best
      assert negative[n] == (usable[n] and is_background)
      if positive[n]:
        assert index[n] == column.argmax()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_samples_are_the_least_of_each_kind(seed):
  rng = np.random.default_rng(seed)
  kind = rng.choice([1, 0, -1], 40, p=rng.dirichlet([1, 1, 1]))
  priorities = rng.permutation(40).astype(np.float32)
  matches = matching.Matches(np.zeros(40, np.int32), kind == 1, kind == 0)
  indices, is_positive, valid = jax.device_get(sample(matches, priorities))
  order = np.argsort(priorities)
  positive = [n for n in order if kind[n] == 1][:5]
  negative = [n for n in order if kind[n] == 0][: 12 - len(positive)]
  np.testing.assert_array_equal(indices[valid], [*positive, *negative])
  np.testing.assert_array_equal(is_positive, np.arange(12) < len(positive))
  np.testing.assert_array_equal(
    valid, np.arange(12) < len(positive) + len(negative)
  )


def test_fewer_candidates_than_samples_are_all_taken():
  matches = matching.Matches(
    np.zeros(3, np.int32),
    np.asarray([True, False, False]),
    np.asarray([False, True, True]),
  )
  samples = sample(matches, np.float32([0.1, 0.3, 0.2]))
  np.testing.assert_array_equal(samples.indices[:3], [0, 2, 1])
  np.testing.assert_array_equal(samples.valid, np.arange(12) < 3)


def test_every_candidate_is_drawn_equally_often():
  matches = matching.Matches(
    jnp.zeros(10, jnp.int32), jnp.zeros(10, bool), jnp.ones(10, bool)
  )

  @jax.jit
  @jax.vmap
  def draw(key):
    return matching.sample(
      matches,
      matching.draw_priorities(key, 10),
      num_samples=3,
      max_positive=1,
    ).indices

  drawn = draw(jax.random.split(jax.random.key(0), 2000))
  counts = np.bincount(np.asarray(drawn).ravel(), minlength=10)
  # 600 each, with a standard deviation of 20.
  assert np.abs(counts - 600).max() < 100

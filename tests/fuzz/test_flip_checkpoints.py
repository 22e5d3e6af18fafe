"""Bits that are flipped in checkpoints; more by hand, see the harness."""

import jax.numpy as jnp

from pqf_jax.core import trees
from pqf_jax.runtime import checkpoint
from tests.fuzz import flip_checkpoints


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path):
  tree = {"kernel": jnp.arange(600.0), "codes": jnp.arange(9, dtype=jnp.uint8)}
  checkpoint.Checkpoints(tmp_path).save("dense", tree, {"top1": 0.5})
  targets = {"dense": trees.shapes(tree)}
  outcomes = list(flip_checkpoints.flips(tmp_path, targets, count=60, seed=0))
  # Every one, because everything is part of the digest.
  assert all(is_refused for _, is_refused in outcomes)
  assert len({path.suffix for path, _ in outcomes}) > 1

"""Permuting every channel group of a ResNet at random leaves its logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pqf_jax.core import channels
from pqf_jax.discovery import discover
from pqf_jax.models import resnet
from tests.models import quick

SHAPE = (2, 16, 16, 3)


def _random(shapes, dtype, seed=0):
  """Draws all variables: the norms of a fresh network are all alike.

  They are NumPy's, which permute without compiling anything.
  """
  rng = np.random.default_rng(seed)

  def draw(leaf):
    if len(leaf.shape) == 1:
      return rng.uniform(0.5, 1.5, leaf.shape).astype(dtype)
    fan_in = np.prod(leaf.shape[:-1])
    return (rng.normal(size=leaf.shape) / np.sqrt(fan_in)).astype(dtype)

  return jax.tree.map(draw, shapes)


def _error(apply, variables, axes, dtype):
  """Returns the largest change of a logit, relative to the largest logit."""
  rng = np.random.default_rng(1)
  permutations = {
    group: rng.permutation(size).astype(np.int32)
    for group, size in channels.group_sizes(variables, axes).items()
  }
  permuted = channels.apply_permutations(variables, axes, permutations)
  images = jnp.asarray(rng.normal(size=SHAPE), dtype)
  before, after = apply(variables, images), apply(permuted, images)
  return float(jnp.abs(after - before).max() / jnp.abs(before).max())


@functools.cache
def _shapes_and_axes():
  model = resnet.make(depth=18, num_classes=10, stem="small")
  images = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  return shapes, discover.infer_channels(model.apply, shapes, images)


@pytest.mark.parametrize(
  ("dtype", "limit"), [("float32", 1e-4), ("float64", 1e-10)]
)
def test_logits_stay_and_one_dropped_member_changes_them(dtype, limit):
  with (
    jax.enable_x64(dtype == "float64"),
    jax.numpy_dtype_promotion("standard"),
  ):
    shapes, axes = _shapes_and_axes()
    model = resnet.make(depth=18, num_classes=10, stem="small", dtype=dtype)
    assert (
      len({axis.group for row in axes.values() for axis in row if axis}) == 12
    )
    variables = _random(shapes, dtype)
    apply = quick.jit(model.apply)
    assert _error(apply, variables, axes, dtype) < limit

    dropped = dict(axes)
    del dropped["batch_stats/layer2/1/bn1/mean"]
    assert _error(apply, variables, dropped, dtype) > 10 * limit

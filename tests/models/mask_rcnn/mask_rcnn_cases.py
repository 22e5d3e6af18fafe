"""Our Mask R-CNN on the cases of the oracle, in float64."""

import contextlib
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pqf_jax.models import mask_rcnn
from tests.oracles import mask_rcnn_weights


@contextlib.contextmanager
def double() -> Iterator[None]:
  """Allows float64, and Flax's norms to mix it with float32."""
  with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
    yield


def make(case: mask_rcnn_weights.Case, dtype=jnp.float64, **settings):
  """Makes the network of a case."""
  return mask_rcnn.make(
    num_classes=case.num_classes,
    min_size=case.min_size,
    max_size=case.max_size,
    depth=case.depth,
    num_proposals=case.num_proposals,
    num_training_proposals=case.num_proposals,
    num_detections=case.num_detections,
    dtype=dtype,
    **settings,
  )


@functools.cache
def template(depth: int, num_classes: int, fc6_layout: str = "chw"):
  """Returns the float32 variables as shapes; no other setting changes them."""
  model = mask_rcnn.make(
    depth=depth,
    num_classes=num_classes,
    fc6_layout=fc6_layout,
    min_size=32,
    max_size=32,
    num_proposals=1,
    num_detections=1,
  )
  images, sizes = jnp.zeros((1, 32, 32, 3), jnp.uint8), jnp.ones((1, 2), int)
  with jax.numpy_dtype_promotion("standard"):
    return jax.eval_shape(model.init, jax.random.key(0), images, sizes)


def variables(case: mask_rcnn_weights.Case, dtype=jnp.float64):
  """Loads the oracle's weights, 250 MB in float64 where the depth is 18."""
  shapes = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype),
    template(case.depth, case.num_classes),
  )
  weights = mask_rcnn_weights.draw(case.depth, case.num_classes)
  return mask_rcnn.load_torch(weights, shapes)

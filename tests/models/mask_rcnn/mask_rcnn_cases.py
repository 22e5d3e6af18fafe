"""Our Mask R-CNN on the cases of the oracle, in float64."""

import contextlib
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pqf_jax.models import mask_rcnn
from tests.oracles import mask_rcnn_weights


@contextlib.contextmanager
def double() -> Iterator[None]:
  """Flax's norms mix float32 with other types, which 'strict' forbids."""
  with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
    yield


def make(case: mask_rcnn_weights.Case, dtype=jnp.float64, **settings):
  """The network of a case."""
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


def shapes(model, dtype):
  """The variables as shapes, all of one type (Flax starts with float32)."""
  images, sizes = jnp.zeros((1, 32, 32, 3), jnp.uint8), jnp.ones((1, 2), int)
  variables = jax.eval_shape(model.init, jax.random.key(0), images, sizes)
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), variables
  )


@functools.cache
def weights(depth: int, num_classes: int) -> dict[str, np.ndarray]:
  """Of the oracle."""
  return mask_rcnn_weights.draw(depth, num_classes)


def variables(model, dtype=jnp.float64):
  """The oracle's weights as variables of the model."""
  return mask_rcnn.load_torch(
    weights(model.depth, model.num_classes), shapes(model, dtype)
  )


@functools.cache
def detect(case: mask_rcnn_weights.Case) -> mask_rcnn.Detections:
  """What is found in all images of a case, in one call."""
  with double():
    model = make(case)
    images, sizes = mask_rcnn_weights.batch(case.sizes, case.buffer)
    return jax.device_get(jax.jit(model.apply)(variables(model), images, sizes))

"""A detector whose outputs are NaN or infinite has no AP and no pictures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pqf_jax import data, errors
from pqf_jax.core import trees
from pqf_jax.data import coco
from pqf_jax.models import mask_rcnn
from pqf_jax.tasks.detection import average_precision, prediction
from tests.data.coco import tiny_coco
from tests.models import quick


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
  folder = tiny_coco.write(tmp_path_factory.mktemp("data") / "tiny")
  return coco.load(str(folder), num_classes=4, with_train=False)


def found(count, **changes):
  """Two certain objects an image."""
  values = {
    "boxes": np.tile(np.float32([0, 0, 5, 5]), (count, 2, 1)),
    "scores": np.full((count, 2), 0.9, np.float32),
    "labels": np.ones((count, 2), np.int32),
    "masks": np.ones((count, 2, 28, 28), np.float32),
    "valid": np.ones((count, 2), bool),
  }
  return mask_rcnn.network.Detections(**values | changes)


@pytest.mark.parametrize("field", ["boxes", "scores", "masks"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_evaluation_names_the_first_image_and_counts(dataset, field, value):
  def detect(variables, batch):
    outputs = found(len(batch["image_id"]))
    # Padding of the batch does not count.
    rows = (batch["image_id"] != 11) | (batch["mask"] == 0)
    getattr(outputs, field)[rows, 1] = value
    return outputs

  evaluate = average_precision.make_evaluate(detect, dataset)
  with pytest.raises(errors.InputError, match="2 of 3 images, first") as caught:
    evaluate({}, data.eval_batches(dataset, batch_size=2))
  assert dataset.test.images[0].file_name in str(caught.value)


def test_pictures_are_refused(dataset):
  def detect(variables, batch):
    return found(len(batch["image"]), scores=variables["scores"])

  scores = np.full((3, 2), 0.9, np.float32)
  good, bad = {"scores": scores}, {"scores": scores.copy()}
  bad["scores"][2, 0] = np.nan
  assert len(prediction.pictures(detect, dataset, 3, {"dense": good})) == 3
  with pytest.raises(errors.InputError, match="1 of 3 images, first"):
    prediction.pictures(detect, dataset, 3, {"dense": good, "packed": bad})


@pytest.fixture(scope="module")
def network():
  """A small one with drawn weights, and what finds objects with it."""
  model = mask_rcnn.make(
    num_classes=3,
    min_size=32,
    max_size=32,
    depth=18,
    norm_epsilon=1e-5,
    num_proposals=4,
    num_detections=2,
    score_threshold=0.0,
  )
  with jax.numpy_dtype_promotion("standard"):
    images = jnp.zeros((2, 32, 32, 3), jnp.uint8)
    sizes = jnp.full((2, 2), 32, jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images, sizes)
    detect = quick.jit(model.apply)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, images.shape, np.uint8)

    def run(variables):
      return jax.device_get(detect(variables, images, sizes))

    flat = trees.flatten(shapes)
    drawn = {
      path: np.float32(
        rng.standard_normal(leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]) / 2)
      )
      if path.endswith("kernel")
      else np.full(leaf.shape, path.endswith(("scale", "var")), np.float32)
      for path, leaf in flat.items()
    }
    yield trees.replace(shapes, drawn), run


# Of each part of the network; every kernel is finite, its products are not.
OVERFLOWING = (
  "params/backbone/body/conv1/kernel",
  "params/rpn/head/cls_logits/kernel",
  "params/rpn/head/bbox_pred/kernel",
  "params/roi_heads/box_predictor/cls_score/kernel",
  "params/roi_heads/box_predictor/bbox_pred/kernel",
  "params/roi_heads/mask_predictor/mask_fcn_logits/kernel",
)


def test_a_network_that_overflows_says_so_and_a_sound_one_does_not(network):
  variables, run = network
  assert average_precision.finite_images(run(variables)).all()
  flat = trees.flatten(variables)
  for path in OVERFLOWING:
    kernel = np.where(flat[path] > 0, np.float32(3e38), np.float32(-3e38))
    outputs = run(trees.replace(variables, {path: kernel}))
    assert not average_precision.finite_images(outputs).any(), path

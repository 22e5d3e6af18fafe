"""Losses and gradients, against torchvision's on the same samples."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pqf_jax.models import torch_names
from pqf_jax.models.mask_rcnn import matching, roi_heads, rpn
from pqf_jax.tasks import detection
from tests.models.mask_rcnn import mask_rcnn_cases as cases
from tests.oracles import mask_rcnn_weights

GOLDEN = np.load(
  pathlib.Path(__file__).parents[2] / "goldens" / "mask_rcnn.npz"
)
DECONVOLUTION = "roi_heads.mask_predictor.conv5_mask.weight"


@pytest.fixture(scope="module")
def step():
  """batch -> (losses, gradients of their sum by torch's names), compiled once.

  Samples are drawn in the order of their numbers, as in the oracle.
  """
  weights = mask_rcnn_weights
  with pytest.MonkeyPatch.context() as patch:
    for module, count, most in (
      (rpn, weights.NUM_ANCHORS, weights.NUM_ANCHORS // 2),
      (roi_heads, weights.NUM_BOXES, weights.NUM_MASKS),
    ):
      patch.setattr(module, "NUM_SAMPLES", count)
      patch.setattr(module, "MAX_POSITIVE", most)
    patch.setattr(
      matching,
      "draw_priorities",
      lambda key, count: jnp.arange(count).astype(jnp.float32),
    )
    model = cases.make(weights.TRAINING, canvas=(64, 96))
    loss_fn = detection.make_loss(
      functools.partial(model.apply, method="training_outputs")
    )

    def loss_of(params, statistics, batch):
      key = jax.random.key(0)
      return loss_fn({"params": params, "batch_stats": statistics}, batch, key)

    with cases.double():
      variables = cases.variables(model)
      gradient = jax.jit(jax.grad(loss_of, has_aux=True))

      def run(batch):
        with cases.double():
          found = gradient(variables["params"], variables["batch_stats"], batch)
        gradients, (collections, losses) = jax.device_get(found)
        assert collections == {}
        named = torch_names.flax_to_torch({"params": gradients})
        named[DECONVOLUTION] = named[DECONVOLUTION].swapaxes(0, 1)
        return losses, named

      yield run


def test_losses_and_gradients_are_those_that_torchvision_gave(step):
  losses, gradients = step(mask_rcnn_weights.training_batch())
  for name, loss in losses.items():
    # torchvision compares objectness with labels of float32.
    tolerance = 1e-7 if name == "loss_objectness" else 1e-10
    expected = GOLDEN[f"losses/{name}"]
    np.testing.assert_allclose(loss, expected, rtol=0, atol=tolerance)
    assert expected > 0.1
  found = mask_rcnn_weights.summarize(gradients)
  names = [
    name.removeprefix("gradients/")
    for name in GOLDEN.files
    if name.startswith("gradients/")
  ]
  assert len(names) == 62  # all but the norms, which torchvision freezes
  # Small boxes read the finest map, so that the coarse ones may stay unused.
  assert sum(GOLDEN[f"gradients/{name}"][0] > 0 for name in names) > 55
  for name in names:
    expected = GOLDEN[f"gradients/{name}"]
    np.testing.assert_allclose(
      found[name], expected, rtol=0, atol=1e-9 * expected[0]
    )


@pytest.mark.parametrize("kind", ["none", "full", "tiny", "padding"])
def test_any_number_of_objects_gives_finite_losses(step, kind):
  batch = mask_rcnn_weights.training_batch()
  if kind == "none":
    batch["valid"][:] = False
  elif kind == "full":  # no padding left, and all are the same object
    batch["valid"][:] = True
    batch["boxes"][:], batch["labels"][:] = [0, 0, 62, 50], 1
  elif kind == "tiny":
    batch["boxes"][:, 0, 2:] = batch["boxes"][:, 0, :2] + 0.01
  else:  # what padding holds is no matter
    before = step(batch)[0]
    batch["boxes"][~batch["valid"]] = [10, 10, 40, 40]
    batch["labels"][~batch["valid"]] = 3
    batch["masks"][~batch["valid"]] = 255
  losses, gradients = step(batch)
  assert all(np.isfinite(loss) for loss in losses.values())
  assert all(np.isfinite(array).all() for array in gradients.values())
  if kind == "none":
    for name in ("loss_mask", "loss_box_reg", "loss_rpn_box_reg"):
      assert losses[name] == 0
    assert losses["loss_objectness"] > 0
  if kind == "padding":
    assert losses == before

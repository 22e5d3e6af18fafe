"""Losses and gradients, against torchvision's on the same samples."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pqf_jax.core import trees
from pqf_jax.models import mask_rcnn, torch_names
from pqf_jax.models.mask_rcnn import matching, roi_heads, rpn
from pqf_jax.tasks.detection import loss as detection_loss
from tests.models import quick
from tests.models.mask_rcnn import mask_rcnn_cases as cases
from tests.oracles import mask_rcnn_weights

GOLDEN = np.load(
  pathlib.Path(__file__).parents[2] / "goldens" / "mask_rcnn.npz"
)
CASE = mask_rcnn_weights.TRAINING


def draw_signs(template):
  """Returns the oracle's random directions as int8 variables."""
  shapes = mask_rcnn_weights.shapes(CASE.depth, CASE.num_classes)
  signs = {
    name: mask_rcnn_weights.signs(name, shape).astype(np.int8)
    for name, shape in shapes.items()
  }
  int8 = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.int8), template
  )
  return mask_rcnn.load_torch(signs, int8)["params"]


@pytest.fixture(scope="module")
def step():
  """Returns batch -> (losses, {torch's name: (norm, inner product)}).

  The gradients of the sum of the losses are summarized as in the oracle, within
  the program: they would take 250 MB. Samples are drawn in the order of their
  numbers, as there.
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
    model = cases.make(CASE, canvas=(64, 96))
    loss_fn = detection_loss.make_loss(
      functools.partial(model.apply, method="training_outputs")
    )

    def loss_of(params, statistics, batch):
      variables = {"params": params, "batch_stats": statistics}
      return loss_fn(variables, batch, jax.random.key(0))

    def summarize(gradient, signs):
      inner = jnp.sum(gradient * signs)
      return jnp.stack([jnp.sqrt(jnp.sum(jnp.square(gradient))), inner])

    @functools.partial(quick.jit, optimize=True)
    def run(params, statistics, batch, signs):
      gradients, (collections, losses) = jax.grad(loss_of, has_aux=True)(
        params, statistics, batch
      )
      assert collections == {}
      return losses, jax.tree.map(summarize, gradients, signs)

    with cases.double():
      variables = cases.variables(CASE)
      signs = draw_signs(variables)

    def losses_and_gradients(batch):
      with cases.double():
        losses, summaries = jax.device_get(
          run(variables["params"], variables["batch_stats"], batch, signs)
        )
      return losses, {
        torch_names.torch_name(f"params/{path}"): pair
        for path, pair in trees.flatten(summaries).items()
      }

    yield losses_and_gradients


def test_losses_and_gradients_are_those_that_torchvision_gave(step):
  batch = mask_rcnn_weights.training_batch()
  # Torchvision's batch had no padding, so nothing may depend on it.
  padding = ~batch["valid"]
  assert padding.any()
  batch["boxes"][padding] = [10, 10, 40, 40]
  batch["labels"][padding] = 3
  batch["masks"][padding] = 255
  losses, gradients = step(batch)
  for name, loss in losses.items():
    # torchvision compares objectness with labels of float32.
    tolerance = 1e-7 if name == "loss_objectness" else 1e-10
    expected = GOLDEN[f"losses/{name}"]
    np.testing.assert_allclose(loss, expected, rtol=0, atol=tolerance)
    assert expected > 0.1
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
      gradients[name], expected, rtol=0, atol=1e-9 * expected[0]
    )


def assert_finite(losses, gradients):
  # A norm is finite only if every entry is.
  assert all(np.isfinite(loss) for loss in losses.values())
  assert all(np.isfinite(pair).all() for pair in gradients.values())


def test_images_without_objects_train_only_what_finds_none(step):
  batch = mask_rcnn_weights.training_batch()
  batch["valid"][:] = False
  losses, gradients = step(batch)
  assert_finite(losses, gradients)
  for name in ("loss_mask", "loss_box_reg", "loss_rpn_box_reg"):
    assert losses[name] == 0
  assert losses["loss_objectness"] > 0


def test_any_number_and_size_of_objects_gives_finite_losses(step):
  batch = mask_rcnn_weights.training_batch()
  # The first image has no padding left, and all are the same object; those of
  # the second are tiny.
  batch["valid"][0] = True
  batch["boxes"][0], batch["labels"][0] = [0, 0, 62, 50], 1
  batch["boxes"][1, :, 2:] = batch["boxes"][1, :, :2] + 0.01
  assert_finite(*step(batch))

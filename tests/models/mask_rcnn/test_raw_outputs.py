"""What two networks are compared by: their outputs at the same places."""

import jax
import numpy as np
import pytest

from pqf_jax.models.mask_rcnn import network, roi_heads
from tests.models import quick
from tests.models.mask_rcnn import mask_rcnn_cases as cases
from tests.oracles import mask_rcnn_weights

pytestmark = pytest.mark.slow
CASE = mask_rcnn_weights.TRAINING


def test_outputs_at_given_places_are_those_of_training(monkeypatch):
  monkeypatch.setattr(roi_heads, "NUM_SAMPLES", 12)
  monkeypatch.setattr(roi_heads, "MAX_POSITIVE", 5)
  model = cases.make(CASE, canvas=(64, 96))

  def run(variables, batch):
    images = batch["image"], batch["size"]
    trained = model.apply(
      variables, batch, jax.random.key(0), method="training_outputs"
    )
    samples = trained.boxes
    at = network.Places(samples.boxes, samples.labels, samples.valid)
    found = model.apply(variables, *images, method="find_places")
    return (
      trained,
      model.apply(variables, *images, at, method="raw_outputs"),
      found,
      model.apply(variables, *images, found, method="raw_outputs"),
    )

  with cases.double():
    trained, raw, found, at_found = jax.device_get(
      quick.jit(run)(cases.variables(CASE), mask_rcnn_weights.training_batch())
    )
  for field in ("class_logits", "box_offsets", "mask_logits"):
    np.testing.assert_allclose(
      getattr(raw, field), getattr(trained, field), rtol=1e-12
    )
  # The sampled anchors are among all of them.
  for image, logits in enumerate(trained.anchors.logits):
    valid = trained.anchors.valid[image]
    exists = raw.exists[image]
    assert np.isin(logits[valid], raw.anchor_logits[image][exists]).all()

  # Places are ordered by what the network says of them.
  assert found.boxes.shape == (*found.valid.shape, 4)
  assert found.valid.shape[1] == 12
  probability = np.asarray(jax.nn.softmax(at_found.class_logits))[:, :, 1:]
  for image, valid in enumerate(found.valid):
    assert (np.diff(valid.astype(int)) <= 0).all()
    best = probability[image].max(1)[valid]
    assert (np.diff(best) <= 0).all() and len(best) > 1
    np.testing.assert_array_equal(
      found.labels[image][valid], probability[image].argmax(1)[valid] + 1
    )

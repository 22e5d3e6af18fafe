import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pqf_jax import errors
from pqf_jax.tasks import detection

B, N, R, M, C = 2, 6, 5, 3, 4


def draw_outputs(seed=0, positive=True):
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)

  def mask(*shape):
    return (rng.random(shape) < 0.5) & positive

  anchors_positive, boxes_positive = mask(B, N), mask(B, R)
  labels = rng.integers(1, C, (B, R)).astype(np.int32)
  return types.SimpleNamespace(
    anchors=types.SimpleNamespace(
      logits=normal(B, N),
      positive=anchors_positive,
      valid=anchors_positive | mask(B, N),
      offsets=normal(B, N, 4) / 5,
      targets=normal(B, N, 4) / 5,
    ),
    boxes=types.SimpleNamespace(
      labels=np.where(boxes_positive, labels, 0),
      positive=boxes_positive,
      valid=boxes_positive | mask(B, R),
      targets=normal(B, R, 4) / 5,
    ),
    class_logits=normal(B, R, C),
    box_offsets=normal(B, R, 4) / 5,
    mask_logits=normal(B, M, 7, 7),
    mask_targets=rng.random((B, M, 7, 7)).astype(np.float32),
    mask_valid=boxes_positive[:, :M],
  )


def smooth_l1(error, beta):
  return 0.5 * error**2 / beta if abs(error) < beta else abs(error) - beta / 2


def cross_entropy(logit, target):
  p = 1 / (1 + np.exp(-np.float64(logit)))
  return -(target * np.log(p) + (1 - target) * np.log(1 - p))


def test_losses_are_sums_over_the_samples_of_the_whole_batch():
  o = draw_outputs()
  found = jax.jit(lambda: detection.compute_losses(o))()
  rows = [(b, n) for b, n in np.ndindex(B, N) if o.anchors.valid[b, n]]
  hits = [row for row in rows if o.anchors.positive[row]]
  objectness = [
    cross_entropy(o.anchors.logits[row], float(o.anchors.positive[row]))
    for row in rows
  ]
  regions = [
    smooth_l1(
      float(o.anchors.offsets[*row, i] - o.anchors.targets[*row, i]), 1 / 9
    )
    for row in hits
    for i in range(4)
  ]
  places = [(b, r) for b, r in np.ndindex(B, R) if o.boxes.valid[b, r]]
  matched = [place for place in places if o.boxes.positive[place]]
  probability = np.asarray(jax.nn.softmax(o.class_logits), np.float64)
  classes = [-np.log(probability[*p, int(o.boxes.labels[p])]) for p in places]
  boxes = [
    smooth_l1(float(o.box_offsets[*p, i] - o.boxes.targets[*p, i]), 1 / 9)
    for p in matched
    for i in range(4)
  ]
  pixels = [
    cross_entropy(o.mask_logits[*p, i, j], float(o.mask_targets[*p, i, j]))
    for p in np.ndindex(B, M)
    if o.mask_valid[p]
    for i, j in np.ndindex(7, 7)
  ]
  expected = {
    "loss_objectness": np.mean(objectness),
    "loss_rpn_box_reg": np.sum(regions) / len(rows),
    "loss_classifier": np.mean(classes),
    "loss_box_reg": np.sum(boxes) / len(places),
    "loss_mask": np.mean(pixels),
  }
  assert found.keys() == expected.keys()
  assert 0 < len(hits) < len(rows) and 0 < len(matched) < len(places)
  for name, loss in expected.items():
    np.testing.assert_allclose(found[name], loss, rtol=1e-5)


def test_the_mean_over_devices_is_the_loss_of_the_whole_batch():
  whole = draw_outputs()
  # The second device has sampled nothing in its image.
  none = np.arange(B)[:, None] == 0
  whole.anchors.valid &= none
  whole.anchors.positive &= none
  expected = jax.jit(lambda: detection.compute_losses(whole))()

  def of_device(anchors, rest):
    outputs = types.SimpleNamespace(
      anchors=types.SimpleNamespace(**anchors),
      boxes=types.SimpleNamespace(**rest.pop("boxes")),
      **rest,
    )
    return detection.compute_losses(outputs, axis="data")

  rest = vars(whole) | {"boxes": vars(whole.boxes)}
  del rest["anchors"]
  # Each device has one image.
  shares = jax.tree.map(lambda rows: rows[:, None], (vars(whole.anchors), rest))
  found = jax.jit(jax.vmap(of_device, axis_name="data"))(*shares)
  for name, loss in expected.items():
    np.testing.assert_allclose(np.mean(found[name]), loss, rtol=1e-5)
    assert len(set(np.asarray(found[name]).tolist())) == 2


def test_nothing_sampled_gives_zeros_and_finite_gradients():
  def total(logits, offsets):
    outputs = draw_outputs(positive=False)
    outputs.class_logits, outputs.box_offsets = logits, offsets
    outputs.anchors.targets = jnp.full((B, N, 4), jnp.inf)
    return sum(detection.compute_losses(outputs).values())

  outputs = draw_outputs()
  arguments = outputs.class_logits, outputs.box_offsets
  loss, gradients = jax.jit(jax.value_and_grad(total, (0, 1)))(*arguments)
  assert loss == 0
  for gradient in gradients:
    np.testing.assert_array_equal(gradient, 0)


def test_the_key_of_the_step_draws_the_samples():
  drawn = []

  def forward(variables, batch, key):
    del variables, batch
    drawn.append(jax.random.bits(key))
    return draw_outputs()

  loss_fn = detection.make_loss(forward)
  for seed in (0, 1, 0):
    loss, (collections, metrics) = loss_fn({}, {}, jax.random.key(seed))
    np.testing.assert_allclose(loss, sum(metrics.values()), rtol=1e-6)
    assert collections == {}
  assert drawn[0] == drawn[2] != drawn[1]


def draw_raw(seed):
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)

  return types.SimpleNamespace(
    exists=rng.random((B, N)) < 0.7,
    anchor_logits=normal(B, N),
    anchor_offsets=normal(B, N, 4) / 5,
    class_logits=normal(B, R, C),
    box_offsets=normal(B, R, 4) / 5,
    mask_logits=normal(B, M, 7, 7),
  )


PLACES = types.SimpleNamespace(valid=np.array([[1, 1, 1, 1, 0], [1] * 5]) > 0)


def test_losses_with_a_teacher_are_sums_weighed_by_its_probabilities():
  o, t = draw_raw(0), draw_raw(1)
  found = jax.jit(
    lambda: detection.follow_teacher(o, t, PLACES, temperature=2.0)
  )()

  def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum()

  def entropy(logit, wanted):
    return 4 * cross_entropy(logit / 2, 1 / (1 + np.exp(-wanted / 2)))

  def distance(one, other):
    pairs = zip(one.tolist(), other.tolist(), strict=True)
    return sum(smooth_l1(a - b, 1 / 9) for a, b in pairs)

  likely = {
    a: 1 / (1 + np.exp(-np.float64(t.anchor_logits[a])))
    for a in np.ndindex(B, N)
    if t.exists[a]
  }
  boxes = [p for p in np.ndindex(B, R) if PLACES.valid[p]]
  objects = {p: 1 - softmax(t.class_logits[p])[0] for p in boxes}
  masks = [p for p in boxes if p[1] < M]
  classes = [
    -4 * softmax(t.class_logits[p] / 2) @ np.log(softmax(o.class_logits[p] / 2))
    for p in boxes
  ]
  expected = {
    "loss_objectness": sum(
      entropy(o.anchor_logits[a], t.anchor_logits[a]) for a in likely
    )
    / sum(likely.values()),
    "loss_rpn_box_reg": sum(
      weight * distance(o.anchor_offsets[a], t.anchor_offsets[a])
      for a, weight in likely.items()
    )
    / sum(likely.values()),
    "loss_classifier": np.mean(classes),
    "loss_box_reg": sum(
      weight * distance(o.box_offsets[p], t.box_offsets[p])
      for p, weight in objects.items()
    )
    / len(boxes),
    "loss_mask": sum(
      objects[p] * entropy(o.mask_logits[p], t.mask_logits[p]).mean()
      for p in masks
    )
    / sum(objects[p] for p in masks),
  }
  assert found.keys() == expected.keys()
  for name, loss in expected.items():
    np.testing.assert_allclose(found[name], loss, rtol=1e-5)


def test_a_network_that_follows_its_teacher_has_nothing_to_learn():
  taught = draw_raw(0)

  def total(outputs):
    outputs = types.SimpleNamespace(**outputs)
    return sum(detection.follow_teacher(outputs, taught, PLACES).values())

  floats = vars(taught) | {"exists": np.zeros((B, N), np.float32)}
  gradients = jax.jit(jax.grad(total))(floats)
  for gradient in gradients.values():
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_a_share_of_the_loss_follows_the_teacher():
  def forward(variables, batch, key):
    del variables, batch, key
    return draw_outputs()

  def raw(variables, images, sizes, places):
    del images, sizes, places
    return draw_raw(variables)

  teach = detection.make_teacher(
    lambda variables, images, sizes: {"valid": PLACES.valid},
    lambda variables, *inputs: vars(draw_raw(1)),
    {},
  )
  batch = teach({"image": np.zeros(1), "size": np.zeros(1)})
  batch = {
    name: types.SimpleNamespace(**batch[name]) for name in ("places", "teacher")
  } | {"image": batch["image"], "size": batch["size"]}

  def loss(share):
    loss_fn = detection.make_loss(forward, raw, share=share)
    return float(loss_fn(0, batch, jax.random.key(0))[0])

  np.testing.assert_allclose(
    loss(0.25), 0.75 * loss(0.0) + 0.25 * loss(1.0), rtol=1e-5
  )
  with pytest.raises(errors.InputError, match="needs raw_fn"):
    detection.make_loss(forward, share=0.5)

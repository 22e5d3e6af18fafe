import types

import jax
import jax.numpy as jnp
import numpy as np

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

"""The loss and the count against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from pqf_jax import errors
from pqf_jax.tasks import classification

CLASSES = 7
KEY = jax.random.key(0)


def _apply(variables, images, train, mutable=(), rngs=None):
  logits = images.reshape(len(images), -1) @ variables["params"]["kernel"]
  return (logits, {"batch_stats": {"seen": 1}}) if train else logits


def _identity(images):
  return images


@pytest.fixture
def student(rng):
  return {"params": {"kernel": rng.normal(size=(12, CLASSES))}}


@pytest.fixture
def rng():
  return np.random.default_rng(0)


@pytest.fixture
def batch(rng):
  return {
    "image": rng.normal(size=(5, 2, 2, 3)),
    "label": rng.integers(0, CLASSES, 5).astype(np.int32),
  }


def _logits(variables, batch):
  return batch["image"].reshape(5, -1) @ variables["params"]["kernel"]


def _cross_entropy(targets, logits):
  return -(targets * special.log_softmax(logits, axis=1)).sum(1).mean()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_loss_mixes_labels_and_teacher(student, batch, rng, share, temperature):
  teacher = {"params": {"kernel": rng.normal(size=(12, CLASSES))}}
  with jax.enable_x64(True):
    taught = classification.make_teacher(_apply, _identity, teacher)(batch)
    loss_fn = classification.make_loss(
      _apply, _identity, share=share, temperature=temperature
    )
    loss, (updated, _) = loss_fn(student, taught, KEY)
  hard = _cross_entropy(
    np.eye(CLASSES)[batch["label"]], _logits(student, batch)
  )
  soft = _cross_entropy(
    special.softmax(_logits(teacher, batch) / temperature, axis=1),
    _logits(student, batch) / temperature,
  )
  soft *= temperature**2
  np.testing.assert_allclose(loss, (1 - share) * hard + share * soft, rtol=1e-6)
  assert updated == {"batch_stats": {"seen": 1}}


def test_images_may_come_beside_their_mirror_images(batch, rng):
  teacher = {"params": {"kernel": rng.normal(size=(12, CLASSES))}}
  mirror = batch | {"image": batch["image"][:, :, ::-1]}
  with jax.enable_x64(True):
    taught = classification.make_teacher(
      _apply, _identity, teacher, mirrored=True
    )(batch)
  mean = (_logits(teacher, batch) + _logits(teacher, mirror)) / 2
  for number, seen in enumerate((batch, mirror)):
    np.testing.assert_array_equal(taught["image"][number::2], seen["image"])
    np.testing.assert_array_equal(taught["label"][number::2], batch["label"])
    np.testing.assert_allclose(taught["teacher_logits"][number::2], mean)


def test_a_student_equal_to_its_teacher_learns_nothing_from_it(student, batch):
  student = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), student)
  batch["image"] = batch["image"].astype(np.float32)
  taught = classification.make_teacher(_apply, _identity, student)(batch)
  loss_fn = classification.make_loss(_apply, _identity, share=1.0)
  gradient = jax.grad(lambda v: loss_fn(v, taught, KEY)[0])(student)
  assert np.abs(gradient["params"]["kernel"]).max() < 1e-6
  by_label = classification.make_loss(_apply, _identity)
  gradient = jax.grad(lambda v: by_label(v, taught, KEY)[0])(student)
  assert np.abs(gradient["params"]["kernel"]).max() > 1e-3


def test_labels_are_not_looked_at_where_the_teacher_says_all(
  student, batch, rng
):
  teacher = {"params": {"kernel": rng.normal(size=(12, CLASSES))}}
  taught = classification.make_teacher(_apply, _identity, teacher)(batch)
  loss_fn = classification.make_loss(
    _apply, _identity, share=1.0, temperature=2.0
  )
  without = taught | {"label": np.full(5, -1, np.int32)}
  losses = [loss_fn(student, each, KEY)[0] for each in (taught, without)]
  np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)


def test_evaluation_counts_masked_images_out_and_breaks_ties_as_argmax(rng):
  logits = rng.integers(0, 4, (40, 9)).astype(np.float32)  # many ties
  label = rng.integers(0, 9, 40).astype(np.int32)
  mask = (np.arange(40) < 33).astype(np.float32)
  evaluate = classification.make_evaluate(
    lambda variables, images, train: images, _identity
  )
  batches = [
    {
      "image": logits[i : i + 8],
      "label": label[i : i + 8],
      "mask": mask[i : i + 8],
    }
    for i in range(0, 40, 8)
  ]
  order = np.argsort(-logits, axis=1, kind="stable")[:33]
  hits = order == label[:33, None]
  assert evaluate({}, batches) == {
    "top1": pytest.approx(hits[:, 0].mean()),
    "top5": pytest.approx(hits[:, :5].any(1).mean()),
    "images": 33,
  }


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_have_no_accuracy(rng, value):
  logits = rng.normal(size=(8, 9)).astype(np.float32)
  logits[[2, 7], [3, 4]] = value
  batch = {"image": logits, "label": np.zeros(8, np.int32)}
  evaluate = classification.make_evaluate(
    lambda variables, images, train: images, _identity
  )
  mask = np.float32([1] * 7 + [0])  # the last image is padding
  with pytest.raises(errors.InputError, match="not finite for 1 of 7 images"):
    evaluate({}, [batch | {"mask": mask}])
  mask[2] = 0
  assert evaluate({}, [batch | {"mask": mask}])["images"] == 6

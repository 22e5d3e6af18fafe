"""Cross-entropy with labels, with a teacher's probabilities, or with both."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pqf_jax import finetune
from pqf_jax.discovery import small_maps

PyTree = Any
Batch = Mapping[str, jax.Array]
ApplyFn = Callable[..., Any]
Preprocess = Callable[[jax.Array], jax.Array]


def make_loss(
  apply_fn: ApplyFn,
  preprocess: Preprocess,
  *,
  share: float = 0.0,
  temperature: float = 1.0,
) -> finetune.LossFn:
  """Builds the cross-entropy in training mode, which updates norm statistics.

  Args:
    apply_fn: a Linen module's `apply` that takes `train`; see
      `models.contract.apply_function`.
    preprocess: uint8 images [B, H, W, 3] -> float32, on the device.
    share: of the loss, 0 to 1, whose targets are the teacher's probabilities
      instead of the labels (section 2 of Hinton et al., arXiv 1503.02531);
      batches then come through `make_teacher`. With 1 labels are not looked at.
    temperature: T; probabilities of teacher and student are those of logits / T
      there, and that part of the loss counts T^2 times.

  Returns:
    A `finetune.LossFn` over batches with `image` and `label` int32 [B], or of
    any shape that logits [..., classes] have.
  """

  def loss_fn(
    variables: PyTree, batch: Batch, key: jax.Array
  ) -> tuple[jax.Array, tuple[PyTree, finetune.Metrics]]:
    logits, updated = apply_fn(
      variables,
      preprocess(batch["image"]),
      train=True,
      mutable=["batch_stats"],
      rngs={"dropout": key},
    )
    targets = jax.nn.one_hot(batch["label"], logits.shape[-1])
    loss = optax.softmax_cross_entropy(logits, targets).mean()
    if share:
      taught = jax.nn.softmax(batch["teacher_logits"] / temperature)
      soft = optax.softmax_cross_entropy(logits / temperature, taught).mean()
      loss += share * (temperature**2 * soft - loss)
    return loss, (updated, {})

  return loss_fn


def make_teacher(
  apply_fn: ApplyFn,
  preprocess: Preprocess,
  variables: PyTree,
  *,
  mirrored: bool = False,
) -> Callable[[Batch], Batch]:
  """Builds a function that adds `teacher_logits` [B, classes] to a batch.

  Args:
    apply_fn: of the teacher.
    preprocess: as of `make_loss`.
    variables: of the teacher.
    mirrored: whether each image is followed by its mirror image. The batch is
      then twice as large, and the mean of the logits of both, which is a better
      teacher than either, is the target of both.
  """

  @small_maps.jit
  def teach(variables: PyTree, batch: Batch) -> Batch:
    seen = _beside_mirror_images(batch) if mirrored else {}
    images = {**batch, **seen}["image"]
    logits = apply_fn(variables, preprocess(images), train=False)
    if mirrored:
      means = logits.reshape(-1, 2, *logits.shape[1:]).mean(1)
      logits = jnp.repeat(means, 2, axis=0)
    return {**seen, "teacher_logits": logits}

  # An argument, because a constant of that size would be compiled in.
  return lambda batch: {**batch, **teach(variables, batch)}


def _beside_mirror_images(batch: Batch) -> dict[str, jax.Array]:
  """Returns a batch twice as large; see `make_teacher`."""
  twice = {name: jnp.repeat(field, 2, axis=0) for name, field in batch.items()}
  image = batch["image"]
  # One after the other, so that both are on the same device.
  pairs = jnp.stack((image, jnp.flip(image, 2)), axis=1)
  return {**twice, "image": pairs.reshape(-1, *image.shape[1:])}

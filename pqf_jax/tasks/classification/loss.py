"""Cross-entropy with labels, with a teacher's probabilities, or with both."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from pqf_jax import finetune

PyTree = Any
Batch = Mapping[str, jax.Array]
ApplyFn = Callable[..., Any]
Preprocess = Callable[[jax.Array], jax.Array]


def make_loss(
  apply_fn: ApplyFn, preprocess: Preprocess, *, distillation: float = 0.0
) -> finetune.LossFn:
  """Builds the cross-entropy in training mode, which updates norm statistics.

  Args:
    apply_fn: a Linen module's `apply` that takes `train`; see
      `models.contract.apply_function`.
    preprocess: uint8 images [B, H, W, 3] -> float32, on the device.
    distillation: share of the loss, 0 to 1, whose targets are the teacher's
      probabilities instead of the labels (Hinton et al., arXiv 1503.02531, at
      temperature 1); batches then come through `make_teacher`.

  Returns:
    A `finetune.LossFn` over batches with `image` and `label` int32 [B].
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
    targets = jax.nn.one_hot(batch["label"], logits.shape[1])
    if distillation:
      taught = jax.nn.softmax(batch["teacher_logits"])
      targets += distillation * (taught - targets)
    loss = optax.softmax_cross_entropy(logits, targets).mean()
    return loss, (updated, {})

  return loss_fn


def make_teacher(
  apply_fn: ApplyFn, preprocess: Preprocess, variables: PyTree
) -> Callable[[Batch], Batch]:
  """Builds a function that adds `teacher_logits` [B, classes] to a batch."""

  @jax.jit
  def logits(variables: PyTree, images: jax.Array) -> jax.Array:
    return apply_fn(variables, preprocess(images), train=False)

  # An argument, because a constant of that size would be compiled in.
  return lambda batch: {
    **batch,
    "teacher_logits": logits(variables, batch["image"]),
  }

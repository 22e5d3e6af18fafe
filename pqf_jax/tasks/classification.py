"""Image classification: loss and exactly counted accuracy."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

PyTree = Any
Batch = Mapping[str, jax.Array]
ApplyFn = Callable[..., Any]
Preprocess = Callable[[jax.Array], jax.Array]
TOP_K = 5


def make_loss(
  apply_fn: ApplyFn, preprocess: Preprocess, *, distillation: float = 0.0
) -> Callable[..., Any]:
  """Cross-entropy in training mode, norm statistics updated.

  Args:
    apply_fn: a Linen module's `apply`, which takes `train`.
    preprocess: uint8 images [B, H, W, 3] -> float32, on the device.
    distillation: share of the loss, 0 to 1, whose targets are the teacher's
      probabilities instead of the labels (Hinton et al., arXiv 1503.02531, at
      temperature 1); batches then come through `make_teacher`.

  Returns:
    A `finetune.LossFn` over batches with `image` and `label` int32 [B].
  """

  def loss_fn(
    variables: PyTree, batch: Batch
  ) -> tuple[jax.Array, tuple[PyTree, dict[str, jax.Array]]]:
    logits, updated = apply_fn(
      variables,
      preprocess(batch["image"]),
      train=True,
      mutable=["batch_stats"],
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
  """The map that adds a network's `teacher_logits` [B, classes] to a batch."""

  @jax.jit
  def logits(variables: PyTree, images: jax.Array) -> jax.Array:
    return apply_fn(variables, preprocess(images), train=False)

  # An argument, because a constant of that size would be compiled in.
  return lambda batch: {
    **batch,
    "teacher_logits": logits(variables, batch["image"]),
  }


def make_count(
  apply_fn: ApplyFn, preprocess: Preprocess
) -> Callable[[PyTree, Batch], jax.Array]:
  """(variables, batch) -> [top-1 hits, top-5 hits, images] of its mask."""

  def count(variables: PyTree, batch: Batch) -> jax.Array:
    logits = apply_fn(variables, preprocess(batch["image"]), train=False)
    # Read once: XLA:GPU may compute logits anew for a second reader, rounded
    # in another way, and a class would then be ahead of itself. Of equal logits
    # the first class wins, like argmax.
    _, best = lax.top_k(logits, min(TOP_K, logits.shape[1]))
    found = best == batch["label"][:, None]
    top1, top5 = found[:, 0], found.any(axis=1)
    hits = jnp.stack([top1, top5, jnp.ones_like(top1)])
    return jnp.where(hits, batch["mask"][None], 0.0).sum(axis=1)

  return count


def make_evaluate(
  apply_fn: ApplyFn, preprocess: Preprocess
) -> Callable[[PyTree, Iterable[Batch]], dict[str, float]]:
  """Accuracy over exactly the images whose mask is 1.

  Args:
    apply_fn: as in `make_loss`.
    preprocess: as in `make_loss`.

  Returns:
    evaluate(variables, batches) -> {top1, top5 in 0..1, images}; every batch
    also has `mask` float32 [B], 0 for padding.
  """
  count = jax.jit(make_count(apply_fn, preprocess))

  def evaluate(variables: PyTree, batches: Iterable[Batch]) -> dict[str, float]:
    # One device value a batch, read at the end: no sync between batches.
    counts = [count(variables, batch) for batch in batches]
    top1, top5, images = (float(total) for total in sum(counts))
    return {"top1": top1 / images, "top5": top5 / images, "images": int(images)}

  return evaluate

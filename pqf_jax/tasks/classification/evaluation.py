"""Top-1 and top-5 accuracy, counted exactly."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jax import lax

from pqf_jax import errors
from pqf_jax.discovery import small_maps
from pqf_jax.tasks.classification.loss import (
  ApplyFn,
  Batch,
  Preprocess,
  PyTree,
)

TOP_K = 5


def make_count(
  apply_fn: ApplyFn, preprocess: Preprocess
) -> Callable[[PyTree, Batch], jax.Array]:
  """Builds (variables, batch) -> [top-1, top-5 hits, finite images, images].

  Only images whose `mask` is 1 count.
  """

  def count(variables: PyTree, batch: Batch) -> jax.Array:
    logits = apply_fn(variables, preprocess(batch["image"]), train=False)
    # Read once: XLA:GPU may compute logits anew for a second reader, rounded
    # in another way, and a class would then be ahead of itself. Of equal logits
    # the first class wins, like argmax.
    _, best = lax.top_k(logits, min(TOP_K, logits.shape[1]))
    hit = best == batch["label"][:, None]
    top1, top5 = hit[:, 0], hit.any(axis=1)
    finite = jnp.isfinite(logits).all(axis=1)
    hits = jnp.stack([top1, top5, finite, jnp.ones_like(top1)])
    return jnp.where(hits, batch["mask"][None], 0.0).sum(axis=1)

  return count


def make_evaluate(
  apply_fn: ApplyFn, preprocess: Preprocess
) -> Callable[[PyTree, Iterable[Batch]], dict[str, float]]:
  """Builds the accuracy over exactly the images whose mask is 1.

  Args:
    apply_fn: as in `loss.make_loss`.
    preprocess: as in `loss.make_loss`.

  Returns:
    evaluate(variables, batches) -> {top1, top5 in 0..1, images}; every batch
    also has `mask` float32 [B], 0 for padding. It raises `InputError` where
    logits are NaN or infinite, which have no largest.
  """
  count = small_maps.jit(make_count(apply_fn, preprocess))

  def evaluate(variables: PyTree, batches: Iterable[Batch]) -> dict[str, float]:
    # One device value a batch, read at the end: no sync between batches.
    counts = [count(variables, batch) for batch in batches]
    top1, top5, finite, images = (float(total) for total in sum(counts))
    if finite < images:
      raise errors.InputError(
        f"logits are not finite for {images - finite:.0f} of {images:.0f} "
        "images, so that no class is the largest; the weights are damaged, "
        "overflow, or their training diverged: use others"
      )
    return {"top1": top1 / images, "top5": top5 / images, "images": int(images)}

  return evaluate

"""The distance to a teacher's embeddings, which needs no labels."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pqf_jax import finetune

PyTree = Any
Batch = Mapping[str, jax.Array]


def make_loss(apply_fn: Callable[..., Any]) -> finetune.LossFn:
  """Builds the mean squared distance to the teacher's embeddings.

  Of unit vectors that is 2 - 2 cos. Batches have `tokens` int32 [B, T] and
  come through `make_teacher`.
  """

  def loss_fn(
    variables: PyTree, batch: Batch, key: jax.Array
  ) -> tuple[jax.Array, tuple[PyTree, finetune.Metrics]]:
    del key
    missed = apply_fn(variables, batch["tokens"]) - batch["teacher_embeddings"]
    return jnp.square(missed).sum(1).mean(), ({}, {})

  return loss_fn


def make_teacher(
  apply_fn: Callable[..., Any], variables: PyTree
) -> Callable[[Batch], Batch]:
  """Builds a function that adds `teacher_embeddings` to a batch."""
  apply = jax.jit(apply_fn)
  return lambda batch: {
    **batch,
    "teacher_embeddings": apply(variables, batch["tokens"]),
  }

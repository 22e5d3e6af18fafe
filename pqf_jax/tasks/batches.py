"""Batches of a data set, as trainings and calibrations take them."""

from collections.abc import Iterator
from typing import Any

from pqf_jax import data, finetune
from pqf_jax.data import batching
from pqf_jax.runtime import distributed


def global_batches(
  dataset: batching.Dataset, **order: Any
) -> Iterator[finetune.Batch]:
  """Yields the batches of `data.train_batches`, shared by all processes."""
  batches = data.train_batches(dataset, **order, **distributed.position())
  return map(distributed.shard, batches)


def global_test_batches(
  dataset: batching.Dataset, batch_size: int
) -> Iterator[finetune.Batch]:
  """Yields the batches of `data.eval_batches`, shared by all processes."""
  batches = data.eval_batches(
    dataset, batch_size=batch_size, **distributed.position()
  )
  return map(distributed.shard, batches)


def whole_batches(
  dataset: batching.Dataset, batch_size: int, num_batches: int, seed: int
) -> Iterator[batching.Batch]:
  """Yields batches of which each process gets all."""
  return data.train_batches(
    dataset, batch_size=batch_size, seed=seed, num_steps=num_batches
  )

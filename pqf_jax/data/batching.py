"""Which images a step reads, as a pure function of the seed and its number.

There is no iterator state to save: a run that resumes at a step asks for the
batches from that step on.

Grain shuffles numbers of images and reads ahead; batches of numbers, not of
images, go through it, since that is 1.7 times as fast.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pqf_jax import errors

Batch = dict[str, np.ndarray]
MAX_THREADS = 16
# Batches that wait beyond those in work: enough to hide a slow one.
NUM_READY = 2


def shuffled_batches(
  load: Callable[[np.ndarray, np.ndarray], Batch],
  num_images: int,
  *,
  num_draws: int,
  batch_size: int,
  seed: int,
  start_step: int = 0,
  num_steps: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[Batch]:
  """Batches in an order that is drawn anew for every epoch.

  An epoch is num_images // batch_size steps in which no image comes twice; the
  few that do not fill a batch are left out, other ones in every epoch.

  Args:
    load: (numbers of images int [B / P], draws float64 [B / P, num_draws] in
      [0, 1)) -> batch; a pure function that threads may share.
    num_images: in the data set.
    num_draws: random numbers an image.
    batch_size: images B a step, over all processes.
    seed: of order and draws.
    start_step: number of the first batch.
    num_steps: how many batches; None: without end.
    process_index: which share of every batch this process reads.
    process_count: P; the shares in order are the batch of one process alone.

  Raises:
    InputError: the batch is larger than the data set, or P does not divide B.
  """
  rows = share(batch_size, process_index, process_count)
  if batch_size > num_images:
    raise errors.InputError(
      f"a batch of {batch_size} images cannot be drawn from the {num_images} "
      "training images; lower the batch size"
    )

  def load_share(indices: np.ndarray, rng: np.random.Generator) -> Batch:
    # Drawn for the whole batch, so that shares do not depend on their number.
    draws = rng.random((batch_size, num_draws))[rows]
    return load(indices[rows], draws)

  # Grain adds the epoch to its seed: near seeds would share their orders.
  seed = int(np.random.SeedSequence(seed % 2**32).generate_state(1)[0])
  batches = (
    _indices(num_images)
    .shuffle(seed)
    .batch(batch_size, drop_remainder=True)
    .repeat()
    .random_map(load_share, seed=seed)
  )
  stop = None if num_steps is None else start_step + num_steps
  return _read_ahead(batches[start_step:stop])


def ordered_batches(
  load: Callable[[np.ndarray, np.ndarray], Batch],
  num_images: int,
  *,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[Batch]:
  """Every image once and in order, all batches of one shape.

  Args:
    load: (numbers of images int [B / P], mask float32 [B / P]) -> batch; where
      the mask is 0 the number is that of the first image, to fill up with.
    num_images: in the data set.
    batch_size: as in `shuffled_batches`.
    process_index: as in `shuffled_batches`.
    process_count: as there; every process gets as many batches.

  Raises:
    InputError: P does not divide B.
  """
  rows = share(batch_size, process_index, process_count)

  def load_step(step: int) -> Batch:
    indices = np.arange(step * batch_size, (step + 1) * batch_size)[rows]
    mask = indices < num_images
    return load(np.where(mask, indices, 0), mask.astype(np.float32))

  num_batches = -(-num_images // batch_size)
  return _read_ahead(_indices(num_batches).map(load_step))


def share(batch_size: int, process_index: int, process_count: int) -> slice:
  """Rows of a batch that are one process's.

  Raises:
    InputError: the processes cannot share it evenly, or the index is not one.
  """
  if batch_size < 1 or batch_size % process_count:
    raise errors.InputError(
      f"the batch size {batch_size} is not a positive multiple of the "
      f"{process_count} process(es) that share it"
    )
  if not 0 <= process_index < process_count:
    raise errors.InputError(
      f"process {process_index} is none of 0 to {process_count - 1}"
    )
  size = batch_size // process_count
  return slice(process_index * size, (process_index + 1) * size)


def _indices(count: int) -> Any:
  """A `grain.MapDataset` of 0 to count - 1."""
  import grain  # 0.7 s, and nothing else of the library needs it

  return grain.MapDataset.range(count)


def _read_ahead(batches: Any) -> Iterator[Batch]:
  """Makes batches in threads: decoding an image does not hold Python's lock.

  Grain's worker processes are not used: they need parsed absl flags, which a
  notebook or a test does not have.
  """
  import grain

  num_threads = min(os.cpu_count() or 1, MAX_THREADS)
  options = grain.ReadOptions(
    num_threads=num_threads, prefetch_buffer_size=num_threads + NUM_READY
  )
  return iter(batches.to_iter_dataset(options))

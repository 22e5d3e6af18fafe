"""Order of the images: a pure function of the seed and the step's number.

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
# Batches that wait, besides one in work for each thread: they hide a slow one.
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
  """Yields batches in an order that is drawn anew for every epoch.

  An epoch is num_images // batch_size steps in which no image comes twice; the
  few that do not fill a batch are left out, different ones in every epoch.

  Args:
    load: (numbers of images int [B / P], draws float64 [B / P, num_draws] in
      [0, 1)) -> batch; a pure function that threads may share.
    num_images: in the data set.
    num_draws: random numbers for an image.
    batch_size: images B a step, over all processes.
    seed: of order and draws.
    start_step: number of the first batch.
    num_steps: how many batches; None: no end.
    process_index: which share of every batch this process reads.
    process_count: P; the shares in order make the batch of a single process.

  Raises:
    InputError: the batch is larger than the data set, or P does not divide B.
  """
  rows = rows_of_process(batch_size, process_index, process_count)
  if batch_size > num_images:
    raise errors.InputError(
      f"a batch of {batch_size} images cannot be drawn from the {num_images} "
      "training images; lower the batch size"
    )

  def load_rows(indices: np.ndarray, rng: np.random.Generator) -> Batch:
    # Drawn for the whole batch, so that shares do not depend on their number.
    draws = rng.random((batch_size, num_draws))[rows]
    return load(indices[rows], draws)

  # Grain adds the epoch to its seed: near seeds would share their orders.
  seed = int(np.random.SeedSequence(seed % 2**32).generate_state(1)[0])
  batches = (
    _numbers(num_images)
    .shuffle(seed)
    .batch(batch_size, drop_remainder=True)
    .repeat()
    .random_map(load_rows, seed=seed)
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
  """Yields every image once and in order, in batches of one shape.

  Args:
    load: (numbers of images int [B / P], mask float32 [B / P]) -> batch; where
      the mask is 0, the number is that of the first image, as padding.
    num_images: in the data set.
    batch_size: as in `shuffled_batches`.
    process_index: as in `shuffled_batches`.
    process_count: as there; all processes get the same number of batches.

  Raises:
    InputError: P does not divide B.
  """
  rows = rows_of_process(batch_size, process_index, process_count)

  def load_step(step: int) -> Batch:
    indices = np.arange(step * batch_size, (step + 1) * batch_size)[rows]
    mask = indices < num_images
    return load(np.where(mask, indices, 0), mask.astype(np.float32))

  num_batches = -(-num_images // batch_size)
  return _read_ahead(_numbers(num_batches).map(load_step))


def rows_of_process(
  batch_size: int, process_index: int, process_count: int
) -> slice:
  """Returns the rows of a batch that one process reads.

  Raises:
    InputError: the processes cannot share the batch evenly, or there is no
      process of this index.
  """
  if batch_size < 1 or batch_size % process_count:
    raise errors.InputError(
      f"the batch size {batch_size} is not a positive multiple of the "
      f"{process_count} process(es) that share it"
    )
  if not 0 <= process_index < process_count:
    raise errors.InputError(
      f"there is no process {process_index}: processes are numbered 0 to "
      f"{process_count - 1}"
    )
  size = batch_size // process_count
  return slice(process_index * size, (process_index + 1) * size)


def _numbers(count: int) -> Any:
  """Returns a `grain.MapDataset` of 0 to count - 1."""
  import grain  # takes 0.7 s, and nothing else of the library needs it

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

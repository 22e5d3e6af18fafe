"""Finds out whether a recipe fits hardware that is not here, and its speed."""

import math
from collections.abc import Callable

import ml_collections

from pqf_jax import errors
from pqf_jax.pipeline import job as jobs
from pqf_jax.preflight import hardware, table
from pqf_jax.preflight.programs import Lowered, Programs, counted_by
from pqf_jax.runtime import distributed, progress

# Trials of the search for the largest batch; each takes a minute or two for a
# TPU.
MOST_COMPILATIONS = 5


def run(config: ml_collections.ConfigDict) -> None:
  """Prints the memory and time that each chip of `config.topology` would need.

  Needs no data, no weights and no such chip. Call it before JAX has used any
  device.

  Raises:
    InputError: rules that are still to be chosen, unknown topology, no libtpu,
      a batch that the chips cannot share, or one that does not fit into their
      memory.
  """
  if config.target_bytes:
    raise errors.InputError(
      f"config.target_bytes is {config.target_bytes}: it chooses rules by the "
      "weights and data, without which preflight works; give "
      "--config.target_bytes=0 for config.rules, which need about as much"
    )
  target = hardware.parse(config.topology)
  jobs.check_batches(config, ("finetune",), num_devices=target.num_chips)
  devices = hardware.open_devices(target)
  programs = Programs(config, target, distributed.mesh(devices.sizing))
  trial = programs.try_all()
  if devices.counting is not devices.sizing:
    counter = Programs(config, target, distributed.mesh(devices.counting))
    trial = list(map(counted_by, trial, counter.try_all()))
  progress.show(table.render(target, trial, programs.trained_bytes))
  for note in table.notes(target, devices):
    progress.say(note)
  for setting, entry, lower in (
    ("finetune.batch_size", trial[0], programs.step),
    ("eval_batch_size", trial[1], programs.evaluation),
  ):
    if entry.cost is None or entry.cost.hbm_bytes > target.chip.hbm_bytes:
      raise _refusal(config, target, programs, setting, entry, lower)
  progress.say(f"{config.topology}: everything fits")


def _refusal(
  config: ml_collections.ConfigDict,
  target: hardware.Target,
  programs: Programs,
  setting: str,
  entry: table.Entry,
  lower: Callable[[int], Lowered],
) -> errors.InputError:
  """Builds the error for a batch that does not fit; searches one that does."""
  limit = target.chip.hbm_bytes
  parts = config.finetune.microbatches

  def needed_bytes(batch_size: int) -> float:
    (trial,) = programs.compile([lower(batch_size)])
    refused = trial.cost is None and trial.hbm_bytes <= limit
    return 0 if refused else trial.hbm_bytes

  fits, fails = search_largest(
    needed_bytes,
    entry.batch_size,
    entry.hbm_bytes,
    limit=limit,
    least=programs.trained_bytes,
    unit=target.num_chips * parts,
  )
  needed = (
    f"{table.size(entry.hbm_bytes)} of memory a chip"
    if entry.hbm_bytes
    else "more memory than a chip has"
  )
  advice = f"the largest that fits is {fits}"
  if fails - fits > target.num_chips * parts:
    advice = f"{fits} fits, {fails} does not, between them was not tried"
  if not fits:
    advice = "not even one image a chip fits; take smaller images"
  return errors.InputError(
    f"config.{setting}={entry.batch_size} needs {needed}, where a chip of "
    f"{target.topology} has {table.size(limit)}; {advice}"
  )


def search_largest(
  needed: Callable[[int], float],
  batch_size: int,
  batch_bytes: float,
  *,
  limit: float,
  least: float,
  unit: int,
) -> tuple[int, int]:
  """Finds the largest batch that fits, in few trials.

  Memory is nearly a line in the batch, so each trial lies where the line
  through the last two meets the limit, or halfway where two are not known.

  Args:
    needed: batch -> its bytes; 0 where it does not fit and no size is told.
    batch_size: one that does not fit.
    batch_bytes: what it needs, or 0.
    limit: bytes that there are.
    least: bytes needed without any image.
    unit: batches are multiples of it.

  Returns:
    (largest batch seen to fit or 0, smallest seen not to).
  """
  low, high = 0, batch_size // unit
  known = [(0, least)]
  if batch_bytes:
    known.append((high, batch_bytes))
  for _ in range(MOST_COMPILATIONS):
    if high - low <= 1:
      break
    middle = (low + high) // 2
    if len(known) > 1 and known[-1][1] != known[-2][1]:
      (x0, y0), (x1, y1) = known[-2:]
      middle = x0 + math.floor((limit - y0) * (x1 - x0) / (y1 - y0))
      middle = min(high - 1, max(low + 1, middle))
    middle_bytes = needed(middle * unit)
    if middle_bytes:
      known.append((middle, middle_bytes))
    if 0 < middle_bytes <= limit:
      low = middle
    else:
      high = middle
  return low * unit, high * unit

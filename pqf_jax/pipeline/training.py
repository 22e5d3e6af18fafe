"""The training loop of stages 0 and 3: resumable, and quiet for the device.

The batch of a step is a function of the seed and the step alone, so a resumed
run goes on with exactly the next batch.
"""

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from pqf_jax import errors, finetune
from pqf_jax.core import trees
from pqf_jax.discovery import small_maps
from pqf_jax.runtime import checkpoint, distributed, preemption, progress

PyTree = Any
LOGS_PER_EPOCH = 20


class Schedule(NamedTuple):
  """How long a training takes, and how fast it learns.

  Attributes:
    settings: `config.train` or `config.finetune`.
    num_train: training images.
    checkpoint_steps: steps between saves; an evaluated epoch is saved too.
  """

  settings: ml_collections.ConfigDict
  num_train: int
  checkpoint_steps: int

  @property
  def steps_per_epoch(self) -> int:
    """Training steps of one pass over the images."""
    return self.num_train // self.settings.batch_size

  @property
  def num_steps(self) -> int:
    """Training steps of all epochs."""
    return self.settings.epochs * self.steps_per_epoch

  def make_optimizer(self) -> optax.GradientTransformation:
    """Builds the optimizer; rates grow with the batch (arXiv 1706.02677).

    Raises:
      InputError: see `finetune.make_optimizer`.
    """
    settings = self.settings
    base = settings.base_batch_size or settings.batch_size
    scale = settings.batch_size / base
    return finetune.make_optimizer(
      settings.optimizer,
      learning_rate=scale * settings.learning_rate,
      final_learning_rate=scale * settings.final_learning_rate,
      num_steps=self.num_steps,
      warmup_steps=round(settings.warmup_epochs * self.steps_per_epoch),
      weight_decay=settings.weight_decay,
      momentum=settings.momentum,
    )

  def evaluation_is_due(self, step: int) -> bool:
    """Whether an evaluated epoch ends with this step."""
    interval = self.settings.evaluation_epochs * self.steps_per_epoch
    return step % interval == 0 or step == self.num_steps

  def save_is_due(self, step: int) -> bool:
    """Whether progress is saved after this step.

    After the last step the stage saves its result instead.
    """
    return step < self.num_steps and (
      step % self.checkpoint_steps == 0 or self.evaluation_is_due(step)
    )


class Fitted(NamedTuple):
  """Result of `fit`.

  With a moving average (`ema_decay`) both are averages.

  Attributes:
    last: variables after the last step.
    best: variables of the epoch with the highest metric.
  """

  last: PyTree
  best: PyTree


def fit(
  stage: str,
  variables: PyTree,
  schedule: Schedule,
  *,
  loss_fn: finetune.LossFn,
  batches: Callable[[int], Iterator[finetune.Batch]],
  evaluate: Callable[[PyTree], dict[str, float]],
  metric: str,
  key: jax.Array,
  frozen: Sequence[str] = (),
  slow: Collection[str] = (),
  slow_rate: float = 1.0,
  checkpoints: checkpoint.Checkpoints,
  on_metrics: Callable[[dict[str, Any]], None],
) -> tuple[Fitted, checkpoint.Record]:
  """Trains to the end of the schedule, from wherever an earlier run stopped.

  Args:
    stage: 'train' or 'finetune'; names the progress checkpoints.
    variables: where the training starts.
    schedule: see `Schedule`.
    loss_fn: see `finetune.LossFn`; it sees the images of one device.
    batches: first step -> global batches from that step on.
    evaluate: variables -> metrics, at the end of epochs.
    metric: an epoch with the highest value of it is the best.
    key: random number generator key of the steps.
    frozen: see `finetune.init_state`.
    slow: paths of variables that learn at a lower rate.
    slow_rate: their share of the learning rate.
    checkpoints: where progress is saved.
    on_metrics: receives the records of `metrics.jsonl`.

  Raises:
    InputError: the loss is no longer finite.
    Preempted: the process was asked to stop; all is saved.
  """
  optimizer = schedule.make_optimizer()
  if slow and slow_rate != 1:
    optimizer = finetune.slow_down(optimizer, slow, slow_rate)
  step_fn = finetune.make_finetune_step(
    loss_fn,
    optimizer,
    key=key,
    mesh=distributed.mesh(),
    microbatches=schedule.settings.microbatches,
    ema_decay=schedule.settings.ema_decay,
  )
  # The outer program, which is what is compiled, donates the state as well.
  take_step = small_maps.jit(step_fn, donate_argnums=0)
  state = finetune.init_state(
    variables, optimizer, frozen, averaged=bool(schedule.settings.ema_decay)
  )
  tree, record = checkpoints.restore_progress(
    stage, trees.shapes((state, variables))
  ) or ((state, variables), _first_record())
  # The state's buffers are donated to each step, so nothing may share them.
  state, best = jax.tree.map(jnp.copy, distributed.replicate(tree))
  meter = _Meter(stage, schedule, record, on_metrics)
  first = int(state.step)
  with (
    preemption.catch_stop() as stop_is_requested,
    progress.track(
      stage,
      schedule.num_steps,
      done=first,
      unit="img",
      units_per_step=schedule.settings.batch_size,
    ) as bar,
  ):
    for step, batch in enumerate(batches(first), start=first + 1):
      state, metrics = take_step(state, batch)
      meter.step(step, metrics["loss"])
      bar.advance(loss=metrics["loss"])
      if schedule.evaluation_is_due(step):
        current = finetune.state_variables(state)
        evaluation = evaluate(current)
        meter.epoch(step, evaluation)
        if evaluation[metric] > record["best"]:
          best = jax.tree.map(jnp.copy, current)
          record |= {"best": evaluation[metric], "best_step": step}
        record["evaluation"] = evaluation
      stopped = stop_is_requested(step)
      if schedule.save_is_due(step) or stopped:
        meter.flush()
        checkpoints.save_progress(stage, step, (state, best), meter.record())
      if stopped:
        raise errors.Preempted(
          f"{stage} was asked to stop and is saved at step {step} of "
          f"{schedule.num_steps}; the same command goes on there"
        )
  last = finetune.state_variables(state)
  if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(last)):
    what = "weights are not finite"
    raise _diverged(stage, schedule, what, schedule.num_steps)
  return distributed.unreplicate(Fitted(last, best)), meter.record()


def _first_record() -> checkpoint.Record:
  return {"seconds": 0.0, "best": -1.0, "best_step": 0}


def _diverged(
  stage: str, schedule: Schedule, what: str, step: int
) -> errors.InputError:
  rate = schedule.settings.learning_rate
  return errors.InputError(
    f"{stage} diverged: its {what} at step {step}; lower the learning rate "
    f"(--config.{stage}.learning_rate is {rate:g}) and use another --workdir"
  )


class _Meter:
  """Times and logs; reads a loss one interval late, so no step waits for it."""

  def __init__(
    self,
    stage: str,
    schedule: Schedule,
    record: checkpoint.Record,
    on_metrics: Callable[[dict[str, Any]], None],
  ):
    self._stage, self._schedule, self._record = stage, schedule, record
    self._on_metrics = on_metrics
    self._interval = max(1, schedule.steps_per_epoch // LOGS_PER_EPOCH)
    self._seconds_before = record["seconds"]
    self._start = time.perf_counter()
    self._unread: tuple[int, jax.Array] | None = None
    self._read: tuple[int, float] | None = None

  def record(self) -> checkpoint.Record:
    """The record of the stage so far, with all its seconds."""
    elapsed = time.perf_counter() - self._start
    return self._record | {"seconds": self._seconds_before + elapsed}

  def step(self, step: int, loss: jax.Array) -> None:
    """Takes note of a step, whether or not the device is done with it."""
    if step % self._interval == 0 or step == self._schedule.num_steps:
      self.flush()
      self._unread = step, loss

  def epoch(self, step: int, evaluation: dict[str, float]) -> None:
    """Logs an evaluation."""
    self.flush()
    self._emit(step, evaluation)
    self._read = step, time.perf_counter()

  def flush(self) -> None:
    """Logs the step that was noted last."""
    if self._unread is None:
      return
    (step, loss), self._unread = self._unread, None
    values = {"loss": float(loss)}  # waits for the device
    if not math.isfinite(values["loss"]):
      what = f"loss is {values['loss']}"
      raise _diverged(self._stage, self._schedule, what, step)
    now = time.perf_counter()
    if self._read is not None:  # the first interval holds the compilation
      images = (step - self._read[0]) * self._schedule.settings.batch_size
      values["images_per_second"] = images / (now - self._read[1])
    self._read = step, now
    self._emit(step, values)

  def _emit(self, step: int, values: dict[str, float]) -> None:
    epoch = step / self._schedule.steps_per_epoch
    record = {"stage": self._stage, "step": step, "epoch": epoch, **values}
    self._on_metrics(record)

"""SIGTERM: what a scheduler sends before it takes the machine away."""

import signal
import types
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopSignal:
  """Within its block, SIGTERM is taken note of instead of ending the program.

  Of several processes JAX itself listens to the signal, and finds a step at
  which all of them stop, whichever was asked.
  """

  def __init__(self) -> None:
    self._asked = False
    self._before: Any = None

  def __enter__(self) -> "StopSignal":
    if jax.process_count() == 1:
      try:
        self._before = signal.signal(signal.SIGTERM, self._take_note)
      except ValueError:  # not the main thread, where Python has no signals
        self._before = None
    return self

  def __exit__(self, *error: object) -> None:
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def is_asked(self, step: int) -> bool:
    """Whether to save and stop after this step; the same on all processes."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._asked

  def _take_note(self, number: int, frame: types.FrameType | None) -> None:
    self._asked = True

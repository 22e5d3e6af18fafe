"""Handles SIGTERM, which a scheduler sends before it takes the machine away."""

import signal
import types
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopSignal:
  """Turns SIGTERM, within its block, into a request to save and stop.

  With several processes JAX itself handles the signal: it finds a step at which
  all of them stop, whichever of them received it.
  """

  def __init__(self) -> None:
    self._requested = False
    self._previous: Any = None

  def __enter__(self) -> "StopSignal":
    if jax.process_count() == 1:
      try:
        self._previous = signal.signal(signal.SIGTERM, self._on_signal)
      except ValueError:  # Python handles signals in the main thread only
        self._previous = None
    return self

  def __exit__(self, *error: object) -> None:
    if self._previous is not None:
      signal.signal(signal.SIGTERM, self._previous)

  def is_requested(self, step: int) -> bool:
    """Whether to save and stop after this step; the same on all processes."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._requested

  def _on_signal(self, number: int, frame: types.FrameType | None) -> None:
    self._requested = True

"""Handles SIGTERM, which a scheduler sends before it takes the machine away."""

import contextlib
import signal
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def catch_stop() -> Iterator[Callable[[int], bool]]:
  """Turns SIGTERM, within its block, into a request to save and stop.

  With several processes JAX itself handles the signal: it finds a step at which
  all of them stop, whichever of them received it.

  Yields:
    step -> whether to save and stop after it; the same on all processes.
  """
  if jax.process_count() > 1:
    yield multihost_utils.reached_preemption_sync_point
    return
  received: list[int] = []
  try:
    before = signal.signal(
      signal.SIGTERM, lambda number, frame: received.append(number)
    )
  except ValueError:  # Python handles signals in the main thread only
    yield lambda step: False
    return
  try:
    yield lambda step: bool(received)
  finally:
    signal.signal(signal.SIGTERM, before)

"""Prints the progress of a run: bars on a terminal, sparse lines elsewhere.

Only process 0 prints. Values are formatted when they are shown, and only once
the device has computed them, so that printing does not slow a run down.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import rich.console
import rich.progress

LOG_SECONDS = 5.0
BAR_SECONDS = 0.2

Value = Any
"""A number, a text, a device scalar, or a function () -> one of these."""
# Without `file=`, rich looks up `sys.stdout` at every write.
_CONSOLE = rich.console.Console(highlight=False)


class Bar:
  """Counts the steps of a loop and shows them now and then; see `track`."""

  def __init__(
    self,
    show: Callable[[int, str], None] | None,
    seconds: float,
    total: int,
    done: int,
    unit: str,
    units_per_step: int,
  ) -> None:
    self._show, self._seconds = show, seconds
    self._total, self._done = total, done
    self._unit, self._units_per_step = unit, units_per_step
    self._start = time.monotonic()
    self._next = self._start + seconds
    self._first: tuple[float, int] | None = None
    self._shown: int | None = None
    self._latest: Mapping[str, Value] = {}
    self._awaited: Mapping[str, Value] | None = None

  def advance(self, num_steps: int = 1, **values: Value) -> None:
    """Counts finished steps; never waits for the device.

    Args:
      num_steps: steps since the last call.
      **values: shown after the count, such as `loss`. A function is called, and
        a device scalar read, only when it is shown.
    """
    self._done += num_steps
    self._latest = values or self._latest
    now = time.monotonic()
    if self._first is None:
      # The rate counts from here, because the first step compiles.
      self._first = now, self._done
    if self._show is None or now < self._next:
      return
    # The device is seldom done with the newest scalar. The one that was newest
    # when a line fell due is kept until the device is done with it.
    if self._awaited is None:
      self._awaited = self._latest
    if all(map(_is_ready, self._awaited.values())):
      self._show(self._done, self._text(now, self._awaited))
      self._shown = self._done
      self._awaited = None
      self._next = now + self._seconds

  def finish(self) -> None:
    """Shows the last state if it was not shown; `track` calls it at the end."""
    if self._show is not None and self._shown != self._done:
      self._show(self._done, self._text(time.monotonic(), self._latest))

  def _text(self, now: float, values: Mapping[str, Value]) -> str:
    parts = []
    first_time, first_done = self._first or (now, self._done)
    if now > first_time and self._done > first_done:
      rate = (self._done - first_done) / (now - first_time)
      parts.append(f"{_brief(rate * self._units_per_step)} {self._unit}/s")
      if self._done < self._total:
        parts.append(f"eta {_clock((self._total - self._done) / rate)}")
    if self._done >= self._total:
      parts.append(f"in {_clock(now - self._start)}")
    parts += [f"{name} {_brief(value)}" for name, value in values.items()]
    return " ".join(parts)


@contextlib.contextmanager
def track(
  stage: str,
  total: int,
  *,
  done: int = 0,
  unit: str = "steps",
  units_per_step: int = 1,
) -> Iterator[Bar]:
  """Shows the progress of a loop: a bar on a terminal, else a line every 5 s.

      with track("finetune", 3510, unit="img", units_per_step=64) as bar:
        for step in range(3510):
          bar.advance(loss=loss)

  prints `[finetune] 1200/3510 34% 812 img/s eta 00:41 loss 0.213`, and a last
  line when the block ends without an error. Blocks may be nested.

  Args:
    stage: name before the count.
    total: steps of the whole loop.
    done: steps that an earlier run did.
    unit: of the rate.
    units_per_step: units in one step, such as the images of a batch.

  Yields:
    A `Bar`; call its `advance` after each step.
  """
  with contextlib.ExitStack() as stack:
    show, seconds = None, LOG_SECONDS
    if jax.process_index() == 0 and _CONSOLE.is_interactive:
      show = stack.enter_context(_terminal(stage, total, done))
      seconds = BAR_SECONDS
    elif jax.process_index() == 0:
      show = _log_lines(stage, total)
    bar = Bar(show, seconds, total, done, unit, units_per_step)
    yield bar
    bar.finish()


def say(text: str) -> None:
  """Prints one line, above the bars if there are any.

  This asks JAX for the process, so on a pod call `distributed.start` before.
  """
  if jax.process_index() == 0:
    _CONSOLE.print(text, markup=False, soft_wrap=True)


def say_everywhere(text: str) -> None:
  """Prints one line on every process."""
  _CONSOLE.print(text, markup=False, soft_wrap=True)


def show(renderable: rich.console.RenderableType) -> None:
  """Prints a table or anything else that rich can draw."""
  if jax.process_index() == 0:
    _CONSOLE.print(renderable)


@contextlib.contextmanager
def _terminal(
  stage: str, total: int, done: int
) -> Iterator[Callable[[int, str], None]]:
  columns = (
    rich.progress.TextColumn("{task.description}", markup=False),
    rich.progress.BarColumn(bar_width=16),
    rich.progress.TextColumn("{task.completed:.0f}/{task.total:.0f}"),
    rich.progress.TextColumn("{task.fields[text]}", markup=False),
  )
  with rich.progress.Progress(*columns, console=_CONSOLE) as bars:
    task = bars.add_task(stage, total=total, completed=done, text="")
    yield lambda done, text: bars.update(task, completed=done, text=text)


def _log_lines(stage: str, total: int) -> Callable[[int, str], None]:
  def show_line(done: int, text: str) -> None:
    percent = 100 * done // total if total else 100
    say(f"[{stage}] {done}/{total} {percent}% {text}".rstrip())

  return show_line


def _is_ready(value: Value) -> bool:
  """Whether the value can be read without waiting for a device."""
  return getattr(value, "is_ready", lambda: True)()


def _brief(value: Value) -> str:
  """Returns three digits, or all digits of an integer part up to 1e9."""
  value = value() if callable(value) else value
  try:
    number = float(value)
  except (TypeError, ValueError):
    return str(value)
  return f"{number:.0f}" if 1000 <= abs(number) < 1e9 else f"{number:.3g}"


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  head = f"{hours}:" if hours else ""
  return f"{head}{minutes:02d}:{seconds:02d}"

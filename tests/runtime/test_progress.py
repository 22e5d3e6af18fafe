"""Progress: few lines, never waiting for the device, on process 0 only."""

import io
import itertools

import jax.numpy as jnp
import pytest
import rich.console
import rich.table

from pqf_jax.runtime import progress


@pytest.fixture
def clock(monkeypatch):
  """Returns a clock that the test moves."""

  class Clock:
    now = 100.0

  monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
  return Clock


@pytest.fixture
def pipe(monkeypatch):
  return console(monkeypatch, force_terminal=False)


def console(monkeypatch, **options):
  """Redirects the console of `progress`; returns a function of its lines."""
  file = io.StringIO()
  redirected = rich.console.Console(
    file=file, width=80, highlight=False, color_system=None, **options
  )
  monkeypatch.setattr(progress, "_CONSOLE", redirected)
  return lambda: file.getvalue().splitlines()


def test_a_line_says_where_the_run_is(clock, pipe):
  with progress.track("finetune", 3510, unit="img", units_per_step=29) as bar:
    bar.advance(loss=1.0)  # The rate counts from the end of this step.
    clock.now += 60
    bar.advance(1199 + 1, loss=0.21349)
  # 1200 steps in 60 s: 20 steps, 580 images a second; 2309 steps are left.
  assert pipe()[0] == (
    "[finetune] 1201/3510 34% 580 img/s eta 01:55 loss 0.213"
  )


def test_lines_are_few_and_the_last_state_is_shown(clock, pipe):
  with progress.track("train", 10_000) as bar:
    for step in range(10_000):
      clock.now += 0.01
      bar.advance(loss=step)
  lines = pipe()
  assert 15 <= len(lines) <= 100 / progress.LOG_SECONDS + 1
  assert lines[-1].startswith("[train] 10000/10000 100% 100 steps/s in 01:40")
  assert lines[-1].endswith("loss 9999")


def test_steps_of_an_earlier_run_do_not_count_for_the_rate(clock, pipe):
  with progress.track("train", 100, done=90) as bar:
    for _ in range(10):
      clock.now += 2
      bar.advance()
  assert pipe()[0] == "[train] 93/100 93% 0.5 steps/s eta 00:14"
  assert pipe()[-1] == "[train] 100/100 100% 0.5 steps/s in 00:20"


def test_values_are_computed_only_when_shown(clock, pipe):
  calls = itertools.count(1)
  with progress.track("train", 1000) as bar:
    for _ in range(1000):
      clock.now += 0.1
      bar.advance(calls=lambda: next(calls))
  shown = [line.split()[-1] for line in pipe()]
  assert shown == [str(number) for number in range(1, len(shown) + 1)]


class Scalar:
  """A device scalar that is computed `delay` seconds after its creation."""

  def __init__(self, clock, step, delay):
    self.clock, self.step, self.ready = clock, step, clock.now + delay

  def is_ready(self):
    return self.clock.now >= self.ready

  def __float__(self):
    assert self.is_ready(), "the run waited for the device"
    return float(self.step)


def test_a_run_never_waits_for_the_device(clock, pipe):
  with progress.track("train", 30) as bar:
    for step in range(30):
      clock.now += 1
      bar.advance(loss=Scalar(clock, step, delay=3))
    clock.now += 3
  # A line is due at the 5th second and computed 3 seconds later; and so on.
  assert [line.split()[-1] for line in pipe()] == ["4", "12", "20", "29"]


def test_device_scalars_and_words_are_shown(clock, pipe):
  with progress.track("train", 1) as bar:
    bar.advance(loss=jnp.float32(0.125), rate=12345.6, layer="fc", none=None)
  assert pipe()[-1].endswith("loss 0.125 rate 12346 layer fc none None")


def test_an_error_ends_the_block_without_a_last_line(clock, pipe):
  with pytest.raises(KeyError), progress.track("train", 2) as bar:
    bar.advance(loss=1)
    raise KeyError
  assert pipe() == []


def test_nothing_to_do_is_all_done(clock, pipe):
  with progress.track("train", 0):
    pass
  assert pipe() == ["[train] 0/0 100% in 00:00"]


def test_other_processes_print_nothing_and_compute_no_value(
  clock, pipe, monkeypatch
):
  monkeypatch.setattr(progress.jax, "process_index", lambda: 1)
  with progress.track("train", 100) as bar:
    for _ in range(100):
      clock.now += 10
      bar.advance(loss=lambda: pytest.fail("computed"))
  progress.say("hello")
  progress.show(rich.table.Table("column"))
  assert pipe() == []


def test_text_is_printed_as_it_is_and_never_wrapped(pipe):
  long = "[bold] " + "x" * 200
  progress.say(long)
  progress.say_everywhere("[red] " + long)
  assert pipe() == [long, "[red] " + long]


def test_bars_on_a_terminal_nest(monkeypatch):
  screen = console(monkeypatch, force_terminal=True)
  with progress.track("[finetune]", 4) as bar:
    for _ in range(4):
      bar.advance(loss=0.5)
      with progress.track("evaluate", 2) as inner:
        inner.advance(2)
    progress.say("above")
  text = "\n".join(screen())
  assert "[finetune]" in text
  assert "4/4" in text
  assert "loss 0.5" in text
  assert "above" in text
  assert "evaluate" in text

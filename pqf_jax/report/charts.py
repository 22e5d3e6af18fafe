"""Charts as plain data: bars in percent of the width, curves in a unit box.

The template draws them and decides how they look; this module decides what they
show.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pqf_jax.report import schema, text

MAX_POINTS = 240
MAX_ROWS = 24
STAGE_TITLES = {"train": "Training", "finetune": "Fine-tuning"}

Point = tuple[float, float]


class Row(NamedTuple):
  """One line of a bar chart.

  Attributes:
    label: short name of the layer, group or stage;  full: its whole name.
    widths: of its bars, 0..100.
    figure: the values of the bars as text.
    accepted: False draws it pale, as a change that was not applied.
  """

  label: str
  full: str
  widths: tuple[float, ...]
  figure: str
  accepted: bool = True


class Bars(NamedTuple):
  """A bar chart.

  Attributes:
    title: short;  caption: how to read it.
    legend: one name a bar of a row; empty where a row has one bar.
    rows: the first `MAX_ROWS` at most;  more: the other rows, folded away.
  """

  title: str
  caption: str
  legend: tuple[str, ...]
  rows: Sequence[Row]
  more: Sequence[Row]


class Tick(NamedTuple):
  """A mark on an axis, `position` percent along it."""

  position: float
  label: str


class Curve(NamedTuple):
  """A quantity over epochs.

  Attributes:
    title: short;  caption: how to read it;  summary: the curve in words.
    points: of an SVG polyline in a box of 100 x 100, y downwards.
    x_ticks, y_ticks: marks, in percent from the left and from the bottom.
    reference: height of the dense network's level in percent, or None.
  """

  title: str
  caption: str
  summary: str
  points: str
  x_ticks: Sequence[Tick]
  y_ticks: Sequence[Tick]
  reference: float | None


def score_charts(results: schema.Results) -> list[Bars]:
  """Charts each metric by stage; the whole width is 100 %."""
  charts = []
  for label, rows in schema.scores(results).items():
    bars = []
    for row in rows:
      figure = text.percent(row.value)
      if row.gap is not None and row.stage != "dense":
        figure += f" ({text.points(row.gap)})"
      name = schema.STAGES[row.stage]
      bars.append(Row(name, name, (100 * row.value,), figure))
    caption = ""
    if any("(" in bar.figure for bar in bars):
      caption = "In parentheses: percentage points from the dense network."
    charts.append(_bars(f"{text.capitalize(label)} by stage", caption, bars))
  return charts


def size_chart(
  rows: Sequence[schema.PlanRow] | Sequence[schema.LayerRow],
) -> Bars:
  """Charts the bytes of each kernel, dense and compressed."""
  kernels = [row for row in rows if len(row["shape"]) >= 2]
  largest = max(map(schema.dense_bytes, kernels), default=1)
  bars = [
    _layer_row(
      row["path"],
      (100 * schema.dense_bytes(row) / largest, 100 * row["bytes"] / largest),
      f"{text.size(schema.dense_bytes(row))} → {text.size(row['bytes'])}",
    )
    for row in kernels
  ]
  caption = "A kernel in float32, and its codes and codebook in the file."
  return _bars("Bytes by layer", caption, bars, ("float32", "compressed"))


def distortion_chart(rows: Sequence[schema.LayerRow]) -> Bars:
  """Charts the distortion of each quantized kernel, relative to the largest."""
  worst = max((row["distortion"] for row in rows), default=0) or 1
  bars = [
    _layer_row(
      row["path"],
      (100 * row["distortion"] / worst,),
      text.percent(row["distortion"]),
    )
    for row in rows
  ]
  caption = (
    "Mean squared error of the quantized weights, before fine-tuning, over "
    "their variance."
  )
  return _bars("Distortion by layer", caption, bars)


def permutation_charts(groups: Sequence[schema.GroupRow]) -> list[Bars]:
  """Charts what permuting each channel group gained: log-determinant and error.

  The error is the error of a short k-means; it is drawn where any group has it.
  """
  drops = [row["log_det_before"] - row["log_det_after"] for row in groups]
  largest = max(drops, default=0)
  bars = [
    _group_row(
      row,
      (100 * max(drop, 0) / largest if largest > 0 else 0,),
      f"{row['log_det_before']:.1f} → {row['log_det_after']:.1f}",
    )
    for row, drop in zip(groups, drops, strict=True)
  ]
  caption = (
    "Log-determinant of the covariance of the sub-vectors, before → after; "
    "the bar is the drop. The lower it is, the fewer bits the same error "
    "costs. A group is named by the first kernel that reads it."
  )
  charts = [
    _bars("Log-determinant by channel group", caption, bars),
    _permutation_errors(groups),
  ]
  return [chart for chart in charts if chart.rows]


def _permutation_errors(groups: Sequence[schema.GroupRow]) -> Bars:
  """Charts the error of a short k-means before and after, where it is known."""
  measured = [
    (row, (row["error_before"], row["error_after"]))
    for row in groups
    if row.get("error_before")
  ]
  worst = max((max(errors) for _, errors in measured), default=1)
  bars = [
    _group_row(
      row,
      tuple(100 * error / worst for error in errors),
      " → ".join(map(text.percent, errors)),
    )
    for row, errors in measured
  ]
  caption = (
    "Squared error of a short k-means, over the mean square of the weights. A "
    "permutation is applied only if it lowers this error as well."
  )
  legend = ("before", "permuted")
  return _bars("Error of a short k-means", caption, bars, legend)


def curves(
  history: Sequence[schema.Record], results: schema.Results
) -> list[Curve]:
  """Charts loss and metrics of each stage that have at least two points."""
  drawn = []
  labels = {"loss": "loss", **schema.labels(results)}
  for stage, title in STAGE_TITLES.items():
    for name, label in labels.items():
      scale = 1 if name == "loss" else 100
      points = [
        (record["epoch"], scale * record[name])
        for record in history
        if record["stage"] == stage and record.get(name) is not None
      ]
      dense = results.get(f"{name}_dense") if stage == "finetune" else None
      level = None if dense is None else 100 * dense
      if len(points) > 1:
        unit = "" if name == "loss" else ", %"
        drawn.append(_curve(f"{title}: {label}{unit}", points, level))
  return drawn


def _curve(title: str, points: Sequence[Point], level: float | None) -> Curve:
  xs, ys = zip(*points, strict=True)
  levels = [*ys, *([] if level is None else [level])]
  x_axis = _axis(min(xs), max(xs))
  y_axis = _axis(min(levels), max(levels), widen=True)
  drawn = (
    f"{_percent_along(x, x_axis):.2f},{100 - _percent_along(y, y_axis):.2f}"
    for x, y in _thin(points)
  )
  summary = (
    f"{title} from {ys[0]:.4g} to {ys[-1]:.4g} over epochs {xs[0]:.3g} to "
    f"{xs[-1]:.3g}; lowest {min(ys):.4g}, highest {max(ys):.4g}"
  )
  caption = f"Last {ys[-1]:.4g}."
  caption += "" if level is None else f" Dashed: dense network, {level:.4g}."
  return Curve(
    title,
    caption,
    summary,
    " ".join(drawn),
    [Tick(_percent_along(x, x_axis), f"{x:g}") for x in x_axis.marks],
    [Tick(_percent_along(y, y_axis), f"{y:g}") for y in y_axis.marks],
    None if level is None else _percent_along(level, y_axis),
  )


def _bars(
  title: str, caption: str, rows: list[Row], legend: tuple[str, ...] = ()
) -> Bars:
  return Bars(title, caption, legend, rows[:MAX_ROWS], rows[MAX_ROWS:])


def _group_row(
  row: schema.GroupRow, widths: tuple[float, ...], figure: str
) -> Row:
  """Returns a channel group's row, named by the first kernel that reads it."""
  names = [text.short_path(path) for path in row["consumers"]]
  label = names[0] if names else row["group"]
  label += f" +{len(names) - 1}" if len(names) > 1 else ""
  full = f"{row['group']}: {row['size']} channels read by {', '.join(names)}"
  note = row.get("note")
  full += f" ({note})" if note else ""
  figure += "" if row["accepted"] else " (not applied)"
  return Row(label, full, widths, figure, row["accepted"])


def _layer_row(path: str, widths: tuple[float, ...], figure: str) -> Row:
  return Row(text.short_path(path), path, widths, figure)


def _thin(points: Sequence[Point]) -> Iterator[Point]:
  """Yields means of runs of points: `MAX_POINTS` at most, however long the run.

  A page would otherwise grow with the training.
  """
  length = math.ceil(len(points) / MAX_POINTS)
  for start in range(0, len(points), length):
    xs, ys = zip(*points[start : start + length], strict=True)
    yield sum(xs) / len(xs), sum(ys) / len(ys)


class _Axis(NamedTuple):
  """Ends of an axis, and marks at steps of 1, 2 or 5 times a power of 10."""

  low: float
  high: float
  marks: Sequence[float]


def _axis(low: float, high: float, *, widen: bool = False) -> _Axis:
  """Chooses the marks; `widen` moves the ends to the first and last mark."""
  high = high if high > low else low + (abs(low) or 1)
  least = (high - low) / 5 * (1 - 1e-9)
  power = 10.0 ** math.floor(math.log10(least))
  step = next(power * m for m in (1, 2, 5, 10) if power * m >= least)
  first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  marks = [round(index * step, 12) for index in range(first, last + 1)]
  if widen:
    return _Axis(marks[0], marks[-1], marks)
  return _Axis(low, high, [mark for mark in marks if low <= mark <= high])


def _percent_along(value: float, axis: _Axis) -> float:
  return 100 * (value - axis.low) / (axis.high - axis.low)

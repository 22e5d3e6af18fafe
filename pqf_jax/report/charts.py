"""Charts as plain data: bars in percent of the width, curves in a unit box.

The template draws them and decides how they look; here is only what is true.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pqf_jax.report import schema, text

MOST_POINTS = 240
ROWS_SHOWN = 24
STAGE_TITLES = {"train": "Training", "finetune": "Fine-tuning"}

Point = tuple[float, float]


class Row(NamedTuple):
  """One line of a bar chart.

  Attributes:
    label: what it is about;  full: the same, unabridged.
    widths: of its bars, 0..100.
    figure: what the bars show, in words.
    counts: whether what it shows was taken into the result.
  """

  label: str
  full: str
  widths: tuple[float, ...]
  figure: str
  counts: bool = True


class Bars(NamedTuple):
  """A bar chart.

  Attributes:
    title: short;  caption: how to read it.
    legend: one name a bar of a row, or none where there is one bar.
    rows: at most `ROWS_SHOWN`;  more: those that are folded away.
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
    reference: height of a level to compare with in percent, or None.
  """

  title: str
  caption: str
  summary: str
  points: str
  x_ticks: Sequence[Tick]
  y_ticks: Sequence[Tick]
  reference: float | None


def score_charts(results: schema.Results) -> list[Bars]:
  """Each metric by stage; the whole width is 100 %."""
  charts = []
  for metric, rows in schema.scores(results).items():
    bars = []
    for row in rows:
      figure = text.percent(row.value)
      if row.gap is not None and row.stage != "dense":
        figure += f" ({text.points(row.gap)})"
      name = schema.STAGES[row.stage]
      bars.append(Row(name, name, (100 * row.value,), figure))
    title = f"{schema.METRICS[metric]} by stage"
    caption = ""
    if any("(" in bar.figure for bar in bars):
      caption = "In parentheses: percentage points from the dense network."
    charts.append(_bars(title[0].upper() + title[1:], caption, bars))
  return charts


def size_chart(
  rows: Sequence[schema.PlanRow] | Sequence[schema.LayerRow],
) -> Bars:
  """Bytes of each kernel, dense and compressed."""
  rows = [row for row in rows if len(row["shape"]) >= 2]
  full = max(map(schema.dense_bytes, rows), default=1)
  bars = [
    _layer_row(
      row["path"],
      (100 * schema.dense_bytes(row) / full, 100 * row["bytes"] / full),
      f"{text.size(schema.dense_bytes(row))} → {text.size(row['bytes'])}",
    )
    for row in rows
  ]
  caption = "A kernel in float32, and its codes and codebook in the file."
  return _bars("Bytes by layer", caption, bars, ("float32", "compressed"))


def distortion_chart(rows: Sequence[schema.LayerRow]) -> Bars:
  """Distortion of each quantized kernel, next to the worst of them."""
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
  """What the order of each channel group gained: log-determinant and error.

  The error is that of a short k-means and drawn where any group has one.
  """
  drops = [row["log_det_before"] - row["log_det_after"] for row in groups]
  most = max(drops, default=0)
  bars = [
    _group_row(
      row,
      (100 * max(drop, 0) / most if most > 0 else 0,),
      f"{row['log_det_before']:.1f} → {row['log_det_after']:.1f}",
    )
    for row, drop in zip(groups, drops, strict=True)
  ]
  caption = (
    "Log-determinant of the covariance of the sub-vectors, before → after; "
    "the bar is the drop. The lower it is, the fewer bits the same error "
    "costs. A group is named by the first kernel that reads it."
  )
  errors = _permutation_errors(groups)
  found = [_bars("Log-determinant by channel group", caption, bars), errors]
  return [chart for chart in found if chart.rows]


def _permutation_errors(groups: Sequence[schema.GroupRow]) -> Bars:
  """Error of a short k-means in both orders of the groups that have one."""
  judged = [row for row in groups if row.get("error_before")]
  worst = max(
    (max(row["error_before"], row["error_after"]) for row in judged), default=1
  )
  bars = [
    _group_row(
      row,
      tuple(100 * row[f"error_{when}"] / worst for when in ("before", "after")),
      f"{text.percent(row['error_before'])} → "
      f"{text.percent(row['error_after'])}",
    )
    for row in judged
  ]
  caption = (
    "Squared error of a short k-means in both orders, over the mean square of "
    "the weights. An order is taken only if it lowers this as well."
  )
  legend = ("as it was", "as found")
  return _bars("Error of a short k-means", caption, bars, legend)


def curves(
  history: Sequence[schema.MetricRecord], results: schema.Results
) -> list[Curve]:
  """Loss and evaluations of each stage that has two points or more."""
  found = []
  for stage, title in STAGE_TITLES.items():
    for name in ("loss", *schema.METRICS):
      scale = 1 if name == "loss" else 100
      points = [
        (record["epoch"], scale * record[name])
        for record in history
        if record["stage"] == stage and record.get(name) is not None
      ]
      dense = results.get(f"{name}_dense") if stage == "finetune" else None
      level = None if dense is None else 100 * dense
      if len(points) > 1:
        label = schema.METRICS.get(name, name)
        unit = "" if name == "loss" else ", %"
        found.append(_curve(f"{title}: {label}{unit}", points, level))
  return found


def _curve(title: str, points: Sequence[Point], level: float | None) -> Curve:
  xs, ys = zip(*points, strict=True)
  levels = [*ys, *([] if level is None else [level])]
  x_axis = _axis(min(xs), max(xs))
  y_axis = _axis(min(levels), max(levels), widen=True)
  drawn = (
    f"{_along(x, x_axis):.2f},{100 - _along(y, y_axis):.2f}"
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
    [Tick(_along(x, x_axis), f"{x:g}") for x in x_axis[2]],
    [Tick(_along(y, y_axis), f"{y:g}") for y in y_axis[2]],
    None if level is None else _along(level, y_axis),
  )


def _bars(
  title: str, caption: str, rows: list[Row], legend: tuple[str, ...] = ()
) -> Bars:
  return Bars(title, caption, legend, rows[:ROWS_SHOWN], rows[ROWS_SHOWN:])


def _group_row(
  row: schema.GroupRow, widths: tuple[float, ...], figure: str
) -> Row:
  """A row about a channel group, named by the first kernel that reads it."""
  names = [text.short_path(path) for path in row["children"]]
  label = names[0] if names else row["group"]
  label += f" +{len(names) - 1}" if len(names) > 1 else ""
  full = f"{row['group']}: {row['size']} channels read by {', '.join(names)}"
  note = row.get("note")
  full += f" ({note})" if note else ""
  figure += "" if row["accepted"] else " (not taken)"
  return Row(label, full, widths, figure, row["accepted"])


def _layer_row(path: str, widths: tuple[float, ...], figure: str) -> Row:
  return Row(text.short_path(path), path, widths, figure)


def _thin(points: Sequence[Point]) -> Iterable[Point]:
  """Means of runs of points, so that a long run does not make a long page."""
  length = math.ceil(len(points) / MOST_POINTS)
  for start in range(0, len(points), length):
    part = points[start : start + length]
    yield tuple(sum(axis) / len(part) for axis in zip(*part, strict=True))


def _axis(
  low: float, high: float, *, widen: bool = False
) -> tuple[float, float, list[float]]:
  """Ends of an axis and its marks at steps of 1, 2 or 5 times a power of 10."""
  high = high if high > low else low + (abs(low) or 1)
  wanted = (high - low) / 5 * (1 - 1e-9)
  power = 10.0 ** math.floor(math.log10(wanted))
  step = next(power * m for m in (1, 2, 5, 10) if power * m >= wanted)
  first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  marks = [round(index * step, 12) for index in range(first, last + 1)]
  if widen:
    return marks[0], marks[-1], marks
  return low, high, [mark for mark in marks if low <= mark <= high]


def _along(value: float, axis: tuple[float, float, list[float]]) -> float:
  low, high, _ = axis
  return 100 * (value - low) / (high - low)

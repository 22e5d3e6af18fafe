"""Charts as plain data: bars in percent of the width, curves in a unit box.

The template draws them and decides how they look; this module decides what they
show.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from pqf_jax import inspection
from pqf_jax.core import plan
from pqf_jax.report import schema, text

MAX_POINTS = 240
MAX_ROWS = 24
STEP = 32  # of a logarithmic axis: two of them are a unit of bytes
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
    ticks: marks of the axis, in percent; empty where the figures say enough.
  """

  title: str
  caption: str
  legend: tuple[str, ...]
  rows: Sequence[Row]
  more: Sequence[Row]
  ticks: Sequence["Tick"] = ()


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
  for label, by_stage in schema.scores(results).items():
    rows = []
    for stage, (value, gap) in by_stage.items():
      figure = text.percent(value)
      figure += "" if gap is None else f" ({text.points(gap)})"
      name = schema.STAGES[stage]
      rows.append(Row(name, name, (100 * value,), figure))
    caption = "In parentheses: percentage points from the dense network."
    charts.append(_bars(f"{text.capitalize(label)} by stage", caption, rows))
  return charts


def size_chart(layers: Sequence[plan.LayerSize]) -> Bars:
  """Charts the bytes of each kernel, dense and compressed.

  The axis is logarithmic: sizes of a network span five powers of ten.
  """
  kernels = [layer for layer in layers if len(layer.shape) >= 2]
  sizes = [
    (schema.dense_bytes(layer), layer.payload_bytes) for layer in kernels
  ]
  axis = _LogAxis.of([size for pair in sizes for size in pair])
  rows = [
    _layer_row(
      layer.path,
      (axis.percent(dense), axis.percent(packed)),
      f"{text.size(dense)} → {text.size(packed)}",
    )
    for layer, (dense, packed) in zip(kernels, sizes, strict=True)
  ]
  caption = (
    "A kernel in float32, and its codes and codebook in the file. From mark to "
    f"mark there are {STEP} times as many bytes."
  )
  bars = _bars("Bytes by layer", caption, rows, ("float32", "compressed"))
  return bars._replace(ticks=axis.ticks())


def distortion_chart(distortion: Mapping[str, float]) -> Bars:
  """Charts the distortion of each quantized kernel, relative to the largest.

  Args:
    distortion: {path: mean squared error / variance of the weights}.
  """
  worst = max(distortion.values(), default=0) or 1
  rows = [
    _layer_row(path, (100 * value / worst,), text.percent(value))
    for path, value in distortion.items()
  ]
  caption = (
    "Mean squared error of the quantized weights, before fine-tuning, over "
    "their variance."
  )
  return _bars("Distortion by layer", caption, rows)


def use_chart(kernels: Sequence[inspection.Kernel]) -> Bars:
  """Charts the bits of each kernel's codes, and their entropy."""
  most = max((math.log2(k.size.num_codes) for k in kernels), default=1)
  rows = []
  for kernel in kernels:
    bits = math.log2(kernel.size.num_codes)
    rows.append(
      _layer_row(
        kernel.size.path,
        (100 * bits / most, 100 * kernel.entropy / most),
        f"{kernel.entropy:.2f} of {bits:.4g} bits",
      )
    )
  caption = (
    "Bits of a code, and its entropy: the bits that the best code for these "
    "frequencies would need."
  )
  return _bars("Use of codes", caption, rows, ("bits of a code", "entropy"))


def permutation_charts(groups: Sequence[schema.Group]) -> list[Bars]:
  """Charts what permuting each channel group gained: log-determinant and error.

  The error of a short k-means is drawn where a group has one.
  """
  drops = [group["log_det_before"] - group["log_det_after"] for group in groups]
  largest = max([0, *drops]) or 1
  rows = [
    _group_row(
      group,
      (100 * max(drop, 0) / largest,),
      f"{group['log_det_before']:.1f} → {group['log_det_after']:.1f}",
    )
    for group, drop in zip(groups, drops, strict=True)
  ]
  caption = (
    "Log-determinant of the covariance of the sub-vectors, before → after; "
    "the bar is the drop. The lower it is, the fewer bits the same error "
    "costs. A group is named by the first kernel that reads it."
  )
  charts = [
    _bars("Log-determinant by channel group", caption, rows),
    _permutation_errors(groups),
  ]
  return [chart for chart in charts if chart.rows]


def _permutation_errors(groups: Sequence[schema.Group]) -> Bars:
  """Charts the error of a short k-means before and after, where it is known."""
  measured = [
    (group, (group["error_before"], group["error_after"]))
    for group in groups
    if group["error_before"]
  ]
  worst = max((max(errors) for _, errors in measured), default=1)
  rows = [
    _group_row(
      group,
      tuple(100 * error / worst for error in errors),
      " → ".join(map(text.percent, errors)),
    )
    for group, errors in measured
  ]
  caption = (
    "Squared error of a short k-means, over the mean square of the weights. A "
    "permutation is applied only if it lowers this error as well."
  )
  legend = ("before", "permuted")
  return _bars("Error of a short k-means", caption, rows, legend)


def curves(
  history: Sequence[schema.Record], results: schema.Results
) -> list[Curve]:
  """Charts loss and metrics of each stage that have at least two points."""
  drawn = []
  labels = {"loss": "loss", **results["metrics"]}
  for stage, title in STAGE_TITLES.items():
    for name, label in labels.items():
      scale, unit = (1, "") if name == "loss" else (100, ", %")
      points = [
        (record["epoch"], scale * record[name])
        for record in history
        if record["stage"] == stage and record.get(name) is not None
      ]
      dense = results.get(f"{name}_dense") if stage == "finetune" else None
      level = None if dense is None else scale * dense
      if len(points) > 1:
        drawn.append(_curve(f"{title}: {label}{unit}", points, level))
  return drawn


def _curve(title: str, points: Sequence[Point], level: float | None) -> Curve:
  xs, ys = zip(*points, strict=True)
  levels = [*ys, *([] if level is None else [level])]
  x_axis = _axis(min(xs), max(xs))
  y_axis = _axis(min(levels), max(levels), widen=True)
  drawn = (
    f"{x_axis.percent(x):.2f},{100 - y_axis.percent(y):.2f}"
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
    x_axis.ticks(),
    y_axis.ticks(),
    None if level is None else y_axis.percent(level),
  )


def _bars(
  title: str, caption: str, rows: list[Row], legend: tuple[str, ...] = ()
) -> Bars:
  return Bars(title, caption, legend, rows[:MAX_ROWS], rows[MAX_ROWS:])


def _group_row(
  group: schema.Group, widths: tuple[float, ...], figure: str
) -> Row:
  """Returns a channel group's row, named by the first kernel that reads it."""
  names = [text.short_path(path) for path in group["consumers"]]
  label = text.reader(group["consumers"], group["group"])
  label += f" +{len(names) - 1}" if len(names) > 1 else ""
  full = f"{group['group']}: {group['size']} channels read by "
  full += ", ".join(names) + (f" ({group['note']})" if group["note"] else "")
  figure += "" if group["accepted"] else " (not applied)"
  return Row(label, full, widths, figure, group["accepted"])


def _layer_row(path: str, widths: tuple[float, ...], figure: str) -> Row:
  return Row(text.short_path(path), path, widths, figure)


def _thin(points: Sequence[Point]) -> Iterator[Point]:
  """Yields means of `MAX_POINTS` runs of points, so that a page stays small."""
  length = math.ceil(len(points) / MAX_POINTS)
  for start in range(0, len(points), length):
    xs, ys = zip(*points[start : start + length], strict=True)
    yield sum(xs) / len(xs), sum(ys) / len(ys)


class _Axis(NamedTuple):
  """Ends of an axis, and marks at steps of 1, 2 or 5 times a power of 10."""

  low: float
  high: float
  marks: Sequence[float]

  def percent(self, value: float) -> float:
    return 100 * (value - self.low) / (self.high - self.low)

  def ticks(self) -> list[Tick]:
    return [Tick(self.percent(mark), f"{mark:g}") for mark in self.marks]


class _LogAxis(NamedTuple):
  """A logarithmic axis of bytes, with marks at powers of `STEP`.

  Attributes:
    first: power of the mark at its beginning;  high: value at its end.
  """

  first: int
  high: float

  @classmethod
  def of(cls, sizes: Iterable[int]) -> "_LogAxis":
    """Returns the axis on which each size of 2 or more has a bar."""
    filled = [size for size in sizes if size] or [STEP]
    first = 0
    while STEP ** (first + 1) < min(filled):
      first += 1
    return cls(first, max(*filled, STEP ** (first + 1)))

  def percent(self, size: float) -> float:
    length = math.log(self.high, STEP) - self.first
    return 100 * (math.log(size, STEP) - self.first) / length if size else 0

  def ticks(self) -> list[Tick]:
    last = math.floor(math.log(self.high, STEP) + 1e-9)
    return [
      Tick(self.percent(STEP**power), text.round_size(STEP**power))
      for power in range(self.first, last + 1)
    ]


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

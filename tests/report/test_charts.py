"""Charts: bars in proportion, curves on their marks."""

import math

import numpy as np
import pytest

from pqf_jax.core import plan
from pqf_jax.report import charts

LOSS_ONLY = {"metrics": {}}


def test_bars_of_sizes_grow_with_the_logarithm(run):
  kernels = [layer for layer in run["layers"] if len(layer.shape) > 1]
  chart = charts.size_chart(run["layers"])
  widths = np.array([row.widths for row in [*chart.rows, *chart.more]])
  sizes = np.array(
    [(4 * math.prod(layer.shape), layer.payload_bytes) for layer in kernels]
  )
  assert widths.min() > 0
  assert widths.max() == pytest.approx(100)
  assert [tick.label for tick in chart.ticks] == ["1 KiB", "32 KiB", "1 MiB"]
  marks = np.log([2**10, 2**15, 2**20])
  places = [tick.position for tick in chart.ticks]
  assert places[0] == 0
  slope, offset = np.polyfit(marks, places, 1)
  np.testing.assert_allclose(widths, slope * np.log(sizes) + offset)


def test_a_size_at_a_mark_and_none_at_all_have_bars():
  layers = [
    plan.LayerSize("a", (8, 1), 0, 0, 0, 32),
    plan.LayerSize("b", (0, 4), 0, 0, 0, 0),
  ]
  chart = charts.size_chart(layers)
  assert [row.widths for row in chart.rows] == [(100, 100), (0, 0)]
  assert charts.size_chart([]).rows == []


def test_bars_are_in_proportion(run):
  drops, errors = charts.permutation_charts(run["groups"])
  expected = 0.5 + 0.25 * np.arange(12)
  widths = [row.widths[0] for row in drops.rows]
  np.testing.assert_allclose(widths, 100 * expected / expected.max())
  assert [row.accepted for row in drops.rows].index(False) == 7
  # Group n falls from (20 + n) % to (20 - n) %; the last two have no error.
  widths = [row.widths for row in errors.rows]
  expected = [(20 + n, 20 - n) for n in range(10)]
  np.testing.assert_allclose(widths, np.array(expected) * 100 / 29)
  assert [row.label for row in errors.rows] == [
    row.label for row in drops.rows[:10]
  ]


def test_rows_beyond_the_most_are_folded_away_not_lost():
  distortion = {f"params/{n}": n / 100 for n in range(60)}
  chart = charts.distortion_chart(distortion)
  assert len(chart.rows) == charts.MAX_ROWS
  names = [row.full for row in (*chart.rows, *chart.more)]
  assert names == list(distortion)


def test_bars_of_nothing_and_of_zero(run):
  assert charts.distortion_chart({}).rows == []
  exact = charts.distortion_chart({"params/a/kernel": 0.0})
  assert exact.rows[0].widths == (0,)
  unchanged = run["groups"][0] | {"log_det_after": -60.5}
  assert charts.permutation_charts([unchanged])[0].rows[0].widths == (0,)
  without_errors = run["groups"][10:]
  assert len(charts.permutation_charts(without_errors)) == 1
  assert charts.permutation_charts([]) == []


@pytest.mark.parametrize(
  "losses",
  [[2.0, 1.0, 0.5], [1.0, 1.0], [0.0, 0.0], [1e-9, 3e-9], [-4.0, 1e6]],
)
def test_curve_maps_its_points_onto_its_marks(losses):
  history = [
    {"stage": "train", "step": n, "epoch": n / 2, "loss": loss}
    for n, loss in enumerate(losses)
  ]
  (curve,) = charts.curves(history, LOSS_ONLY)
  points = [tuple(map(float, p.split(","))) for p in curve.points.split()]
  marks = [float(tick.label) for tick in curve.y_ticks]
  places = [tick.position for tick in curve.y_ticks]
  assert 2 <= len(marks) <= 8
  assert places[0] == 0
  assert places[-1] == pytest.approx(100)
  heights = np.interp(losses, marks, places)
  np.testing.assert_allclose([100 - y for _, y in points], heights, atol=0.01)
  assert [x for x, _ in points] == pytest.approx(
    np.linspace(0, 100, len(losses)), abs=0.01
  )


def test_a_long_curve_is_thinned_by_means():
  num = 7 * charts.MAX_POINTS
  losses = np.random.default_rng(0).uniform(0, 1, num)
  losses[:2] = 0, 1
  history = [
    {"stage": "train", "step": n, "epoch": n, "loss": loss}
    for n, loss in enumerate(losses.tolist())
  ]
  (curve,) = charts.curves(history, LOSS_ONLY)
  ys = [float(point.split(",")[1]) for point in curve.points.split()]
  means = losses.reshape(-1, 7).mean(axis=1)
  np.testing.assert_allclose(ys, 100 - 100 * means, atol=0.01)


def test_curve_leaves_out_missing_values_and_marks_the_dense_level():
  history = [
    {"stage": "finetune", "step": n, "epoch": n, "loss": None, "top1": value}
    for n, value in enumerate([0.5, None, 0.6])
  ]
  (curve,) = charts.curves(
    history, {"metrics": {"top1": "top-1"}, "top1_dense": 0.7}
  )
  assert len(curve.points.split()) == 2
  assert curve.reference == pytest.approx(100)
  assert charts.curves(history[:1], LOSS_ONLY) == []


def test_charts_show_the_metrics_of_the_task_and_no_other():
  results = {
    "metrics": {"miou": "mean IoU", "accuracy": "pixel accuracy"},
    "miou_dense": 0.5,
    "miou_packed": 0.25,
    "other_dense": 0.75,
  }
  (bars,) = charts.score_charts(results)
  assert bars.title == "Mean IoU by stage"
  assert [row.widths for row in bars.rows] == [(50,), (25,)]
  history = [
    {"stage": "train", "epoch": n, "miou": 0.1, "accuracy": 0.2, "other": 0.3}
    for n in range(2)
  ]
  titles = [curve.title for curve in charts.curves(history, results)]
  assert titles == ["Training: mean IoU, %", "Training: pixel accuracy, %"]

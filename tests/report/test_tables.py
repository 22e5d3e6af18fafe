"""Tables: totals are sums, and nothing is lost at 80 columns."""

import pytest
import rich.console

from pqf_jax import report
from pqf_jax.report import charts, schema, text


def drawn(renderable, width=80):
  """Returns the text that a table prints into a pipe."""
  console = rich.console.Console(width=width, force_terminal=False)
  with console.capture() as capture:
    console.print(renderable)
  return capture.get()


def test_plan_table_totals_are_sums_of_rows_and_the_published_size(run):
  layers = run["layers"]
  table = drawn(report.plan_table(layers))
  total = next(line for line in table.splitlines() if "total" in line)
  codes = sum(layer.num_subvectors for layer in layers)
  # The paper's ResNet-18 with small blocks: 1.54 MiB.
  assert total.split() == ["total", f"{codes:,}", "1,615,904", "1.11"]
  assert "1.54 MiB, 28.9x smaller than float32 (44.6 MiB)" in table


def test_plan_table_shows_each_kernel_and_folds_vectors_at_80_columns(run):
  lines = drawn(report.plan_table(run["layers"])).splitlines()
  assert max(map(len, lines)) <= 80
  by_layer = {line.split()[0]: line.split() for line in lines if line.strip()}
  cells = ["3x3x512x512", "9", "256", "262,144", "266,752", "0.90"]
  assert by_layer["layer4/1/conv2"][1:] == cells
  assert by_layer["conv1"][1:] == ["7x7x3x64", "dense", "37,632", "32.00"]
  assert by_layer["41"][1:] == ["vectors", "dense", "42,400", "32.00"]
  assert not any("bn1" in line for line in lines)


def test_plan_table_loses_no_letter_of_a_long_path(run):
  path = "params/backbone/" + "abcdefghij/" * 6 + "conv/kernel"
  layer = run["layers"][0]._replace(path=path)
  lines = drawn(report.plan_table([layer])).splitlines()
  assert max(map(len, lines)) <= 80
  column = "".join(line.split()[0] for line in lines[4:] if line.strip())
  assert text.short_path(path) in column


def test_permutation_table_has_the_errors_that_were_computed(run):
  table = drawn(report.permutation_table(run["groups"]))
  lines = table.splitlines()
  assert max(map(len, lines)) <= 80
  by_group = {line.split()[0]: line.split() for line in lines if line.strip()}
  for number, row in enumerate(run["groups"]):
    cells = by_group[text.short_path(row["consumers"][0])][1:]
    expected = [f"{len(row['consumers'])}", f"{row['size']}"]
    expected += [f"{row['log_det_before']:.2f}", f"{row['log_det_after']:.2f}"]
    if number < 10:
      expected += [f"{20 + number}.00", f"{20 - number}.00"]
    assert cells == [*expected, "no" if number == 7 else "yes"]
  bare = [row | {"error_before": 0.0} for row in run["groups"]]
  assert "error" not in drawn(report.permutation_table(bare))
  empty = report.permutation_table([run["groups"][0] | {"consumers": []}])
  assert empty.row_count == 0


def test_groups_of_stacked_layers_are_told_apart(run):
  consumers = ["params/down/kernel", "params/other/kernel"]
  groups = [
    run["groups"][0] | {"group": f"up, layer {i}", "consumers": consumers}
    for i in range(3)
  ]
  table = drawn(report.permutation_table(groups))
  (chart, *_) = charts.permutation_charts(groups)
  for i in range(3):
    assert f"down, layer {i}" in table
    assert [row.label for row in chart.rows][i] == f"down, layer {i} +1"


def test_closing_table_has_every_figure(run):
  results = run["results"]
  table = drawn(report.closing_table(results))
  for stage in schema.STAGES:
    for metric in ("top1", "top5"):
      assert f"{100 * results[f'{metric}_{stage}']:.2f} %" in table
  for figure in ("-26.82", "-1.72", "-1.84", "+0.00", "1,625,024", "28.8x"):
    assert figure in table
  for figure in ("6 min 52 s", "38.5 s", "57.1 s", "4 min 19 s"):
    assert figure in table.replace("\n", " ")


def test_a_task_declares_its_metrics_and_their_order(run):
  results = run["results"] | {
    "metrics": {"loss": "Loss", "miou": "mean [IoU]"},
    "miou_dense": 0.5,
    "miou_packed": 0.25,
    "loss_packed": 0.125,
    "other_packed": 0.75,
  }
  table = drawn(report.closing_table(results))
  assert table.index("Loss") < table.index("mean [IoU]")
  for figure in ("50.00 %", "25.00 %", "-25.00", "12.50 %"):
    assert figure in table
  assert "75.00" not in table


def test_closing_table_of_many_metrics_loses_no_digit_at_80_columns(run):
  metrics = [f"m{number}" for number in range(9)]
  results = run["results"] | {"metrics": {name: name for name in metrics}}
  for number, name in enumerate(metrics):
    results |= {f"{name}_dense": 0.9, f"{name}_packed": 0.5 + number / 1000}
  table = report.closing_table(results)
  narrow, wide = (
    sorted(letter for letter in drawn(table, width) if letter in "0123456789.-")
    for width in (80, 300)
  )
  assert narrow == wide


def test_closing_table_of_a_name_with_markup_and_an_unknown_value(run):
  results = run["results"] | {"name": "[red]x", "top1_dense": None}
  table = drawn(report.closing_table(results))
  assert "[red]x" in table
  assert "96.33 %" in table and "-1.84" not in table


@pytest.mark.parametrize(
  ("call", "expected"),
  [
    (text.size(0), "0 B"),
    (text.size(1023), "1023 B"),
    (text.size(1024), "1.00 KiB"),
    (text.size(1_615_904), "1.54 MiB"),
    (text.size(44.6 * 2**20), "44.6 MiB"),
    (text.size(3 * 2**40), "3072 GiB"),
    (text.points(-0.00001), "+0.00"),
    (text.points(0.0302), "+3.02"),
    (text.duration(59.99), "1 min 00 s"),
    (text.duration(3725), "1 h 02 min"),
    (text.short_path("params/fc/kernel"), "fc"),
    (text.short_path("params/fc/bias"), "fc/bias"),
  ],
)
def test_text(call, expected):
  assert call == expected

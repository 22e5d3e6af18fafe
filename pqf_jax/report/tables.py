"""Draws the tables of a run by rich: readable at 80 columns and in a pipe."""

from collections.abc import Sequence
from typing import NamedTuple

import rich.box
import rich.console
import rich.markup
import rich.table

from pqf_jax.core import plan
from pqf_jax.report import schema, text

COLUMNS = ("shape", "D", "K", "codes", "bytes", "bits/w")


class Line(NamedTuple):
  """A row of the table of layers.

  Attributes:
    label: short name of the variable;  full: its whole path.
    cells: one for each name of `COLUMNS`.
  """

  label: str
  full: str
  cells: Sequence[str]


def plan_lines(layers: Sequence[plan.LayerSize]) -> tuple[list[Line], Line]:
  """Returns the rows of the table of layers, and the row of totals.

  Dense vectors (biases, norms) share one row, after the kernels.
  """
  lines = []
  for layer in layers:
    if len(layer.shape) < 2:
      continue
    codes = ("", "", "dense")
    if layer.num_codes:
      codes = (
        f"{layer.length}",
        f"{layer.num_codes}",
        f"{layer.num_subvectors:,}",
      )
    sums = f"{layer.payload_bytes:,}", f"{layer.bits_per_weight:.2f}"
    cells = (text.shape(layer.shape), *codes, *sums)
    lines.append(Line(text.short_path(layer.path), layer.path, cells))
  vectors = [layer for layer in layers if len(layer.shape) < 2]
  if vectors:
    cells = ("", "", "", "dense", *_sums(vectors))
    lines.append(Line(f"{len(vectors)} vectors", "biases and norms", cells))
  num_subvectors = sum(layer.num_subvectors for layer in layers)
  cells = ("", "", "", f"{num_subvectors:,}", *_sums(layers))
  return lines, Line("total", "", cells)


def plan_table(layers: Sequence[plan.LayerSize]) -> rich.table.Table:
  """Draws what will be compressed and how large the result will be.

  The last row and the caption count all layers, each dense weight as 4 bytes.

  Args:
    layers: every variable that the packed file stores.
  """
  lines, total = plan_lines(layers)
  table = _table("Plan", show_footer=True)
  table.add_column("layer", overflow="fold", footer=total.label)
  for name, footer in zip(COLUMNS, total.cells, strict=True):
    table.add_column(name, justify="right", no_wrap=True, footer=footer)
  for line in lines:
    table.add_row(rich.markup.escape(line.label), *line.cells)
  payload = sum(layer.payload_bytes for layer in layers)
  dense = sum(map(schema.dense_bytes, layers))
  table.caption = (
    f"predicted size {text.size(payload)}, {dense / payload:.1f}x smaller than "
    f"float32 ({text.size(dense)})"
  )
  return table


def permutation_table(groups: Sequence[schema.Group]) -> rich.table.Table:
  """Draws what permuting each channel group gained.

  Groups that no kernel reads are left out. So are the columns of the error of a
  short k-means where no group has one.
  """
  has_errors = any(group["error_before"] for group in groups)
  table = _table("Permutation")
  table.add_column("group", overflow="fold")
  names = ["kernels", "size", "log-det", "after"]
  names += ["error %", "after"] if has_errors else []
  for name in [*names, "applied"]:
    table.add_column(name, justify="right", no_wrap=True)
  for group in groups:
    if not group["consumers"]:
      continue
    cells = [
      f"{len(group['consumers'])}",
      f"{group['size']}",
      f"{group['log_det_before']:.2f}",
      f"{group['log_det_after']:.2f}",
    ]
    if has_errors:
      errors = (group["error_before"], group["error_after"])
      cells += [f"{100 * error:.2f}" if error else "" for error in errors]
    label = text.reader(group["consumers"], group["group"])
    label = rich.markup.escape(label)
    table.add_row(label, *cells, "yes" if group["accepted"] else "no")
  return table


def closing_table(results: schema.Results) -> rich.console.Group:
  """Draws the metrics by stage with their gaps to dense, then size and times.

  A metric without a value leaves its cell empty.
  """
  scores = schema.scores(results)
  table = _table(results["name"])
  table.add_column("stage", overflow="fold")
  for label in scores:
    # Many metrics fold at 80 columns; a figure that is cut off would be lost.
    for name in (rich.markup.escape(label), "gap"):
      table.add_column(name, justify="right", overflow="fold")
  for stage, name in schema.STAGES.items():
    cells = []
    for by_stage in scores.values():
      value, gap = by_stage.get(stage, (None, None))
      cells.append("" if value is None else text.percent(value))
      cells.append("" if gap is None else text.points(gap))
    table.add_row(name, *cells)
  seconds = results["seconds"]
  times = (f"{stage} {text.duration(took)}" for stage, took in seconds.items())
  size = (
    f"{text.size(results['dense_bytes'])} -> {text.size(results['file_bytes'])}"
    f" ({results['file_bytes']:,} bytes), {results['ratio']:.1f}x smaller: "
    f"{results['file']}"
  )
  total = text.duration(sum(seconds.values()))
  return rich.console.Group(table, size, f"{', '.join(times)} (total {total})")


def _table(title: str, *, show_footer: bool = False) -> rich.table.Table:
  return rich.table.Table(
    title=rich.markup.escape(title),
    title_justify="left",
    caption_justify="left",
    box=rich.box.SIMPLE_HEAD,
    pad_edge=False,
    padding=(0, 1, 0, 0),
    show_footer=show_footer,
  )


def _sums(layers: Sequence[plan.LayerSize]) -> tuple[str, str]:
  """Returns the packed bytes of all layers, and the bits of each weight."""
  num_bytes = sum(layer.payload_bytes for layer in layers)
  bits = 32 * num_bytes / max(1, sum(map(schema.dense_bytes, layers)))
  return f"{num_bytes:,}", f"{bits:.2f}"

"""Draws the tables of a run by rich: readable at 80 columns and in a pipe."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import rich.box
import rich.console
import rich.markup
import rich.table

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


def plan_lines(rows: Sequence[schema.PlanRow]) -> tuple[list[Line], Line]:
  """Returns the rows of the table of layers, and the row of totals.

  Dense vectors (biases, norms) share one row, after the kernels.
  """
  kernels = [row for row in rows if len(row["shape"]) >= 2]
  vectors = [row for row in rows if len(row["shape"]) < 2]
  lines = [
    Line(
      text.short_path(row["path"]),
      row["path"],
      (
        text.shape(row["shape"]),
        f"{row['length']}" if row["num_codes"] else "",
        f"{row['num_codes']}" if row["num_codes"] else "",
        f"{row['num_subvectors']:,}" if row["num_codes"] else "dense",
        f"{row['bytes']:,}",
        f"{row['bits_per_weight']:.2f}",
      ),
    )
    for row in kernels
  ]
  if vectors:
    cells = ("", "", "", "dense", *_sums(vectors))
    lines.append(Line(f"{len(vectors)} vectors", "biases and norms", cells))
  codes = f"{sum(row['num_subvectors'] for row in rows):,}"
  return lines, Line("total", "", ("", "", "", codes, *_sums(rows)))


def plan_table(rows: Sequence[schema.PlanRow]) -> rich.table.Table:
  """Draws what will be compressed and how large the result will be.

  The last row and the caption count all rows, each dense weight as 4 bytes.

  Args:
    rows: one for each variable that the packed file stores.
  """
  lines, total = plan_lines(rows)
  table = _table("Plan", show_footer=True)
  table.add_column("layer", overflow="fold", footer=total.label)
  for name, footer in zip(COLUMNS, total.cells, strict=True):
    table.add_column(name, justify="right", no_wrap=True, footer=footer)
  for line in lines:
    table.add_row(rich.markup.escape(line.label), *line.cells)
  payload = sum(row["bytes"] for row in rows)
  dense = sum(map(schema.dense_bytes, rows))
  if payload:
    table.caption = (
      f"predicted size {text.size(payload)}, {dense / payload:.1f}x smaller "
      f"than float32 ({text.size(dense)})"
    )
  return table


def permutation_table(groups: Sequence[schema.GroupRow]) -> rich.table.Table:
  """Draws what permuting each channel group gained.

  The columns of the error of a short k-means are left out where no group has
  one.

  Args:
    groups: one row each; groups that no kernel reads are left out.
  """
  has_errors = any(row.get("error_before") for row in groups)
  table = _table("Permutation")
  table.add_column("group", overflow="fold")
  names = ["kernels", "size", "log-det", "after"]
  names += ["error %", "after"] if has_errors else []
  for name in [*names, "applied"]:
    table.add_column(name, justify="right", no_wrap=True)
  for row in groups:
    if not row["consumers"]:
      continue
    cells = [
      f"{len(row['consumers'])}",
      f"{row['size']}",
      f"{row['log_det_before']:.2f}",
      f"{row['log_det_after']:.2f}",
    ]
    if has_errors:
      errors = (row["error_before"], row["error_after"])
      cells += [f"{100 * error:.2f}" if error else "" for error in errors]
    label = rich.markup.escape(text.short_path(row["consumers"][0]))
    table.add_row(label, *cells, "yes" if row["accepted"] else "no")
  return table


def closing_table(results: schema.Results) -> rich.console.Group:
  """Draws the metrics by stage with their gaps to dense, then size and times.

  Args:
    results: a missing figure leaves its cell empty.
  """
  scores = schema.scores(results)
  table = _table(results.get("name", "Results"))
  table.add_column("stage")
  for label in scores:
    # Many metrics fold at 80 columns; a figure that is cut off would be lost.
    for name in (rich.markup.escape(label), "gap"):
      table.add_column(name, justify="right", overflow="fold")
  for stage, name in schema.STAGES.items():
    cells = list(_score_cells(scores.values(), stage))
    if any(cells):
      table.add_row(name, *cells)
  parts: list[rich.console.RenderableType] = [table] if scores else []
  for line in (size_line(results), seconds_line(results)):
    if line:
      parts.append(rich.markup.escape(line))
  return rich.console.Group(*parts)


def size_line(results: schema.Results) -> str:
  """Returns `44.6 MiB -> 1.54 MiB (1,615,904 bytes), 29.0x smaller: FILE`."""
  if results.get("file_bytes") is None:
    return ""
  line = f"{text.size(results['file_bytes'])} ({results['file_bytes']:,} bytes)"
  if results.get("dense_bytes") is not None:
    line = f"{text.size(results['dense_bytes'])} -> {line}"
  if results.get("ratio") is not None:
    line += f", {results['ratio']:.1f}x smaller"
  return line + (f": {results['file']}" if results.get("file") else "")


def seconds_line(results: schema.Results) -> str:
  """Returns `permute 12.3 s, quantize 4 min 19 s, ... (total 6 min 02 s)`."""
  seconds = results.get("seconds") or {}
  if not seconds:
    return ""
  parts = (f"{stage} {text.duration(took)}" for stage, took in seconds.items())
  return f"{', '.join(parts)} (total {text.duration(sum(seconds.values()))})"


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


def _sums(rows: Sequence[schema.PlanRow]) -> tuple[str, str]:
  num_bytes = sum(row["bytes"] for row in rows)
  dense = sum(map(schema.dense_bytes, rows))
  return f"{num_bytes:,}", f"{32 * num_bytes / dense:.2f}" if dense else ""


def _score_cells(
  scores: Iterable[Sequence[schema.Score]], stage: str
) -> Iterator[str]:
  """Yields value and gap of each metric after a stage, '' where missing."""
  for rows in scores:
    score = next((row for row in rows if row.stage == stage), None)
    yield text.percent(score.value) if score else ""
    gap = score.gap if score and stage != "dense" else None
    yield "" if gap is None else text.points(gap)

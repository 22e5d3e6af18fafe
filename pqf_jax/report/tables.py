"""The tables of a run, drawn by rich: readable at 80 columns and when piped."""

import math
from collections.abc import Iterable, Sequence

import rich.box
import rich.console
import rich.markup
import rich.table

from pqf_jax.report import schema, text


def plan_table(rows: Sequence[schema.PlanRow]) -> rich.table.Table:
  """What will be compressed and how large the result will be.

  Dense vectors (biases, norms) share one row. The last row and the caption
  count all rows, each dense weight as four bytes.

  Args:
    rows: one a variable that the packed file stores.
  """
  table = _table("Plan")
  table.add_column("layer", overflow="fold", footer="total")
  payload = sum(row["bytes"] for row in rows)
  dense = sum(dense_bytes(row) for row in rows)
  codes = sum(row["codes"] for row in rows)
  bits = f"{32 * payload / dense:.2f}" if dense else ""
  for name, footer in (
      ("shape", ""),
      ("D", ""),
      ("K", ""),
      ("codes", f"{codes:,}"),
      ("bytes", f"{payload:,}"),
      ("bits/w", bits),
  ):
    table.add_column(name, justify="right", no_wrap=True, footer=footer)
  vectors = [row for row in rows if len(row["shape"]) < 2]
  for row in rows:
    if len(row["shape"]) >= 2:
      table.add_row(*_plan_cells(row))
  if vectors:
    num_bytes = sum(row["bytes"] for row in vectors)
    num_weights = sum(dense_bytes(row) for row in vectors) // 4
    name = f"{len(vectors)} vectors"
    bits = f"{8 * num_bytes / num_weights:.2f}"
    table.add_row(name, "", "", "", "dense", f"{num_bytes:,}", bits)
  if dense:
    table.caption = (
        f"predicted size {text.size(payload)}, {dense / payload:.1f}x smaller "
        f"than float32 ({text.size(dense)})"
    )
  return table


def dense_bytes(row: schema.PlanRow | schema.LayerRow) -> int:
  """Bytes of a variable in float32."""
  return 4 * math.prod(row["shape"])


def closing_table(results: schema.Results) -> rich.console.Group:
  """What came out: accuracy, its gap to dense, and time by stage; then size.

  Args:
    results: figures that are missing leave their cell empty.
  """
  found = schema.scores(results)
  table = _table(results.get("name", "Results"))
  table.add_column("stage")
  for metric in found:
    table.add_column(schema.METRICS[metric], justify="right", no_wrap=True)
    table.add_column("gap", justify="right", no_wrap=True)
  cells = {
      stage: [name, *_score_cells(found.values(), stage)]
      for stage, name in schema.STAGES.items()
  }
  for row in cells.values():
    if any(row[1:]):
      table.add_row(*row)
  parts = [table] if found else []
  for line in (size_line(results), seconds_line(results)):
    if line:
      parts.append(rich.markup.escape(line))
  return rich.console.Group(*parts)


def size_line(results: schema.Results) -> str:
  """`44.6 MiB -> 1.54 MiB (1,615,904 bytes), 29.0x smaller: model...`."""
  if results.get("file_bytes") is None:
    return ""
  line = f"{text.size(results['file_bytes'])} ({results['file_bytes']:,} bytes)"
  if results.get("dense_bytes") is not None:
    line = f"{text.size(results['dense_bytes'])} -> {line}"
  if results.get("ratio") is not None:
    line += f", {results['ratio']:.1f}x smaller"
  return line + (f": {results['file']}" if results.get("file") else "")


def seconds_line(results: schema.Results) -> str:
  """`permute 12.3 s, quantize 4 min 19 s, ... (total 6 min 02 s)`."""
  seconds = results.get("seconds") or {}
  if not seconds:
    return ""
  parts = (f"{stage} {text.duration(took)}" for stage, took in seconds.items())
  return f"{', '.join(parts)} (total {text.duration(sum(seconds.values()))})"


def _table(title: str) -> rich.table.Table:
  return rich.table.Table(
      title=rich.markup.escape(title),
      title_justify="left",
      caption_justify="left",
      box=rich.box.SIMPLE_HEAD,
      pad_edge=False,
      padding=(0, 1, 0, 0),
      show_footer=title == "Plan",
  )


def _plan_cells(row: schema.PlanRow) -> Iterable[str]:
  path = rich.markup.escape(text.short_path(row["path"]))
  cut = (f"{row['block']}", f"{row['num_codes']}", f"{row['codes']:,}")
  return (
      path,
      text.shape(row["shape"]),
      *(cut if row["num_codes"] else ("", "", "dense")),
      f"{row['bytes']:,}",
      f"{row['bits_per_weight']:.2f}",
  )


def _score_cells(
    found: Iterable[Sequence[schema.Score]], stage: str
) -> Iterable[str]:
  for rows in found:
    match = [row for row in rows if row.stage == stage]
    score = match[0] if match else None
    yield text.percent(score.value) if score else ""
    gap = score.gap if score and stage != "dense" else None
    yield "" if gap is None else text.points(gap)

"""Writes `report.html`: one page about a run, complete in itself.

The page fetches no script, font, picture or address, so it can be mailed.
Charts are inline SVG in the colours of the reader's theme.
"""

import base64
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import markupsafe

from pqf_jax.report import charts, schema, tables, text
from pqf_jax.runtime import files


class Tile(NamedTuple):
  """A headline figure with its label and a short note."""

  label: str
  figure: str
  note: str


def write_html(
  path: str | os.PathLike[str],
  results: schema.Results,
  *,
  config: Mapping[str, Any] | None = None,
  plan_rows: Sequence[schema.PlanRow] = (),
  layers: Sequence[schema.LayerRow] = (),
  groups: Sequence[schema.GroupRow] = (),
  history: Sequence[schema.Record] = (),
  pictures: Sequence[bytes] = (),
) -> None:
  """Writes the report of a run; an empty argument leaves its section out.

  Args:
    path: of the page.
    results: see `schema.Results`.
    config: content of `config.json`.
    plan_rows: one row a stored variable.
    layers: one row a quantized kernel.
    groups: one row a channel group.
    history: content of `metrics.jsonl`.
    pictures: PNG files.
  """
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("pqf_jax.report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  name = os.path.basename(results.get("file") or "")
  environment.filters["breakable"] = _breakable
  page = environment.get_template("report.html").render(
    title=results.get("name") or "Compressed model",
    compressed=results.get("ratio") is not None,
    facts=_facts(results),
    tiles=_tiles(results),
    file=json.dumps(name) if name else "",
    score_charts=charts.score_charts(results),
    curves=charts.curves(history, results),
    layer_charts=[
      chart
      for chart in (
        charts.size_chart(plan_rows or layers),
        charts.distortion_chart(layers),
      )
      if chart.rows
    ],
    permutation_charts=charts.permutation_charts(groups),
    pictures=[base64.b64encode(png).decode() for png in pictures],
    table=_layer_table(plan_rows, layers),
    seconds=[
      (stage, text.duration(took))
      for stage, took in (results.get("seconds") or {}).items()
    ],
    command=results.get("command") or "",
    config=json.dumps(config, indent=2, default=str) if config else "",
  )
  files.write(path, page.encode())


def _facts(results: schema.Results) -> list[str]:
  facts = [results.get("date"), results.get("device")]
  if results.get("seed") is not None:
    facts.append(f"seed {results['seed']}")
  if results.get("images"):
    facts.append(f"{results['images']:,} test images")
  return [str(fact) for fact in facts if fact]


def _tiles(results: schema.Results) -> list[Tile]:
  tiles = []
  if results.get("ratio") is not None:
    ratio = f"{results['ratio']:.1f}×"
    tiles.append(Tile("Smaller", ratio, "than in float32"))
  if results.get("file_bytes") is not None:
    num_bytes = results["file_bytes"]
    before = results.get("dense_bytes")
    note = f"{num_bytes:,} bytes"
    note = note if before is None else f"was {text.size(before)}"
    tiles.append(Tile("File", text.size(num_bytes), note))
  for label, rows in schema.scores(results).items():
    last = rows[-1]
    name = f"{text.capitalize(label)}, {schema.STAGES[last.stage]}"
    note = ""
    if last.gap is not None and last.stage != "dense":
      dense = text.percent(last.value - last.gap)
      note = f"{text.points(last.gap)} points from {dense}"
    tiles.append(Tile(name, text.percent(last.value), note))
  return tiles


def _layer_table(
  plan_rows: Sequence[schema.PlanRow], layers: Sequence[schema.LayerRow]
) -> Mapping[str, Any]:
  """Returns the table of layers with their distortions."""
  distortions = {row["path"]: text.percent(row["distortion"]) for row in layers}
  lines, total = tables.plan_lines(plan_rows)
  return {
    "columns": (*tables.COLUMNS, "distortion"),
    "rows": [
      line._replace(cells=(*line.cells, distortions.get(line.full, "")))
      for line in lines
    ],
    "total": (*total.cells, ""),
  }


def _breakable(path: str) -> markupsafe.Markup:
  """Returns a path that a browser may break after each slash."""
  parts = map(markupsafe.escape, path.split("/"))
  return markupsafe.Markup("/<wbr>").join(parts)

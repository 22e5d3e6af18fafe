"""Writes `report.html`: one page about a run, complete in itself.

The page fetches no script, font, picture or address, so it can be mailed.
Charts are inline SVG in the colours of the reader's theme.
"""

import base64
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import markupsafe

from pqf_jax.core import plan
from pqf_jax.report import charts, schema, tables, text
from pqf_jax.runtime import files


def write_html(
  path: str | os.PathLike[str],
  results: schema.Results,
  *,
  config: Mapping[str, Any],
  layers: Sequence[plan.LayerSize],
  distortion: Mapping[str, float],
  groups: Sequence[schema.Group],
  history: Sequence[schema.Record],
  pictures: Sequence[bytes],
) -> None:
  """Writes the report of a run; what is empty leaves no empty section.

  Args:
    path: of the page.
    results: see `schema.Results`.
    config: content of `config.json`.
    layers: every variable that the packed file stores.
    distortion: {path: relative error} of the quantized kernels.
    groups: the channel groups that a kernel reads.
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
  environment.filters["breakable"] = _breakable
  lines, total = tables.plan_lines(layers)
  page = environment.get_template("report.html").render(
    title=results["name"],
    facts=[
      results["date"],
      results["device"],
      f"seed {results['seed']}",
      f"{results['images']:,} test images",
    ],
    tiles=_tiles(results),
    file=json.dumps(results["file"]),
    score_charts=charts.score_charts(results),
    curves=charts.curves(history, results),
    layer_charts=[
      charts.size_chart(layers),
      charts.distortion_chart(distortion),
    ],
    permutation_charts=charts.permutation_charts(groups),
    pictures=[base64.b64encode(png).decode() for png in pictures],
    columns=tables.COLUMNS,
    lines=lines,
    total=total,
    distortion={path: text.percent(e) for path, e in distortion.items()},
    seconds={
      stage: text.duration(took) for stage, took in results["seconds"].items()
    },
    command=results["command"],
    config=json.dumps(config, indent=2),
  )
  files.write(path, page.encode())


def _tiles(results: schema.Results) -> list[tuple[str, str, str]]:
  """Returns the headline figures, each with its label and a short note."""
  before = text.size(results["dense_bytes"])
  tiles = [
    ("Smaller", f"{results['ratio']:.1f}×", "than in float32"),
    ("File", text.size(results["file_bytes"]), f"was {before}"),
  ]
  for label, by_stage in schema.scores(results).items():
    stage, (value, gap) = list(by_stage.items())[-1]
    name = f"{text.capitalize(label)}, {schema.STAGES[stage]}"
    note = ""
    if gap is not None:
      note = f"{text.points(gap)} points from {text.percent(value - gap)}"
    tiles.append((name, text.percent(value), note))
  return tiles


def _breakable(path: str) -> markupsafe.Markup:
  """Returns a path that a browser may break after each slash."""
  parts = map(markupsafe.escape, path.split("/"))
  return markupsafe.Markup("/<wbr>").join(parts)

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
  inputs: Sequence[tuple[Sequence[int], str]],
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
    inputs: (shape, type) of each input of the network.
    groups: the channel groups that a kernel reads.
    history: content of `metrics.jsonl`.
    pictures: PNG files.
  """
  distortion = results["distortion"]
  lines, total = tables.plan_lines(layers)
  page = render(
    "report.html",
    title=results["name"],
    facts=[
      results["date"],
      results["device"],
      f"seed {results['seed']}",
      f"{results['images']:,} test {results['unit']}",
    ],
    tiles=_tiles(results),
    snippet=_snippet(results["file"], config["model"], inputs),
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
    extra={"distortion": percents(distortion)},
    seconds={
      stage: text.duration(took) for stage, took in results["seconds"].items()
    },
    versions=results["versions"],
    command=results["command"],
    config=json.dumps(config, indent=2),
  )
  files.write(path, page.encode())


def render(template: str, **values: Any) -> str:
  """Returns a page made of one of `templates`."""
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("pqf_jax.report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters["breakable"] = _breakable
  return environment.get_template(template).render(values)


def _snippet(
  file: str,
  model: Mapping[str, Any],
  inputs: Sequence[tuple[Sequence[int], str]],
) -> str:
  """Returns a program that applies the packed network to inputs of zeros."""
  settings = [f"{k}={v!r}" for k, v in model.items() if k != "name"]
  zeros = [f"jnp.zeros({tuple(shape)}, {kind!r})" for shape, kind in inputs]
  return f"""import jax.numpy as jnp
import pqf_jax
from pqf_jax import models

model = models.get_model({model["name"]!r}).make({", ".join(settings)})
variables = pqf_jax.load({file!r})
outputs = model.apply(variables, {", ".join(zeros)})"""


def percents(fractions: Mapping[str, float]) -> dict[str, str]:
  """Returns fractions by name as text in percent."""
  return {path: text.percent(value) for path, value in fractions.items()}


def _tiles(results: schema.Results) -> list[tuple[str, str, str]]:
  """Returns the headline figures, each with its label and a short note."""
  before = text.size(results["dense_bytes"])
  tiles = [
    ("Smaller", f"{results['ratio']:.1f}×", "than in float32"),
    ("File", text.size(results["file_bytes"]), f"was {before}"),
  ]
  return tiles + score_tiles(results)


def score_tiles(results: schema.Results) -> list[tuple[str, str, str]]:
  """Returns the last value of each metric, and how far it is from dense."""
  tiles = []
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

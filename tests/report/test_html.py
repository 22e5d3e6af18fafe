"""The page: all figures, nothing fetched, every name escaped."""

import html.parser
import math
import re

import pytest

from pqf_jax import report
from pqf_jax.report import text

VOID = {"meta", "br", "wbr"}


class Page(html.parser.HTMLParser):
  """Tags, attributes and text of a page, as a browser reads them."""

  def __init__(self, page):
    super().__init__()
    self.tags, self.attributes, self.text, self.open = set(), {}, "", []
    self.feed(page)
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.add(tag)
    for name, value in attrs:
      self.attributes.setdefault(name, set()).add(value)
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.handle_starttag(tag, attrs)
    self.handle_endtag(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] != "style":
      self.text += data


def written(path, run):
  inputs = dict(run)
  report.write_html(path / "report.html", inputs.pop("results"), **inputs)
  return (path / "report.html").read_text(encoding="utf-8")


def test_page_has_every_figure(tmp_path, run):
  results = run["results"]
  page = Page(written(tmp_path, run))
  figures = [
    ["28.8×", "1.55 MiB", "44.6 MiB", "1,615,904"],
    ["-1.72", "-1.84", "-26.82", "-0.22", "-6.73"],
    ["6 min 52 s", "38.5 s", "57.1 s", "4 min 19 s", "1.8 s"],
    ["seed 17", "1,797 test images", '"epochs": 9'],
    ['variables = pqf_jax.load("model.safetensors")'],
    [results[key] for key in ("name", "date", "device", "command")],
    [f"{100 * results[key]:.2f} %" for key in results if "top" in key],
  ]
  figures = [figure for part in figures for figure in part]
  for row in run["layers"]:
    figures += [text.short_path(row["path"]), text.shape(row["shape"])]
    figures += [f"{100 * row['distortion']:.2f} %", f"{row['bytes']:,}"]
    dense = 4 * math.prod(row["shape"])
    figures.append(f"{text.size(dense)} → {text.size(row['bytes'])}")
  for row in run["groups"]:
    before, after = row["log_det_before"], row["log_det_after"]
    figures.append(f"{before:.1f} → {after:.1f}")
    if row["error_before"]:
      before, after = row["error_before"], row["error_after"]
      figures.append(f"{100 * before:.2f} % → {100 * after:.2f} %")
  missing = [figure for figure in figures if figure not in page.text]
  assert not missing
  titles = " ".join(page.attributes["title"])
  assert all(row["path"] in titles for row in run["layers"])
  assert "accuracy fell" in titles


def test_table_of_layers_has_their_distortions(tmp_path, run):
  layers = run.pop("layers")
  without = Page(written(tmp_path, run)).text
  # The chart shows each of them too.
  text_of_page = Page(written(tmp_path, run | {"layers": layers})).text
  for row in layers:
    figure = text.percent(row["distortion"])
    assert text_of_page.count(figure) >= 2 + without.count(figure)


def test_page_of_a_large_network_folds_rows_and_loses_none(tmp_path, run):
  run["layers"] = [
    {"path": f"params/{n}/kernel", "distortion": 0.1} for n in range(60)
  ]
  page = Page(written(tmp_path, run))
  assert "36 more" in page.text
  assert {row["path"] for row in run["layers"]} <= page.attributes["title"]


def test_page_fetches_nothing_and_runs_nothing(tmp_path, run):
  page = written(tmp_path, run)
  fetching = (
    r"https?:|//\w|\bsrc\b|\bhref\b|url\(|@import|<script|<link|\son\w+="
  )
  assert re.findall(fetching, page) == []


def test_page_escapes_hostile_names(tmp_path, run):
  hostile = "</style><script>alert('1')</script>\"onload=\"x'><img src=x>&amp;"
  run["results"] |= dict.fromkeys(("name", "command", "date"), hostile)
  run["results"] |= {"device": hostile, "file": hostile + '");import os#'}
  run["results"]["seconds"] = {hostile: 1.0}
  run["config"] = {hostile: hostile}
  for row in (*run["plan_rows"], *run["layers"]):
    row["path"] += hostile
  for row in run["groups"]:
    row |= {"group": hostile, "consumers": [hostile], "note": hostile}
  page = Page(written(tmp_path, run))
  assert not page.tags & {"script", "img"}
  assert "onload" not in page.attributes
  assert page.text.count(hostile) > len(run["layers"])


@pytest.mark.parametrize(
  "missing",
  ["config", "plan_rows", "layers", "groups", "history"],
)
def test_page_without_an_input_has_no_empty_section(tmp_path, run, missing):
  heading = {
    "config": "Configuration",
    "plan_rows": "All layers",
    "layers": "Distortion by layer",
    "groups": "Permutation",
    "history": "Training: loss",
  }[missing]
  assert heading in Page(written(tmp_path, run)).text
  run[missing] = type(run[missing])()
  assert heading not in Page(written(tmp_path, run)).text


@pytest.mark.parametrize(
  "results",
  [
    {},
    {
      "name": "x",
      "metrics": {"top1": "top-1"},
      "top1_dense": 0.7615,
      "images": 50000,
    },
  ],
)
def test_page_of_a_run_that_only_evaluates(tmp_path, results):
  page = Page(written(tmp_path, {"results": results}))
  assert ("76.15 %" in page.text) == bool(results)
  assert not any(
    word in page.text for word in ("Permutation", "Layers", "Load it", "None")
  )

"""The page: all figures, nothing fetched, every name escaped."""

import base64
import html.parser
import math
import re

import pytest

from pqf_jax import report
from pqf_jax.report import text

VOID = {"meta", "br", "wbr", "img"}


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
    ["variables = pqf_jax.load('model.safetensors')"],
    [results[key] for key in ("name", "date", "device", "command")],
    results["versions"].values(),
    [f"{100 * results[key]:.2f} %" for key in results if "top" in key],
  ]
  figures = [figure for part in figures for figure in part]
  for layer in run["layers"]:
    if layer.num_codes:
      figures += [text.short_path(layer.path), text.shape(layer.shape)]
      figures.append(f"{layer.payload_bytes:,}")
      dense = 4 * math.prod(layer.shape)
      figures.append(f"{text.size(dense)} → {text.size(layer.payload_bytes)}")
  figures += map(text.percent, results["distortion"].values())
  for row in run["groups"]:
    before, after = row["log_det_before"], row["log_det_after"]
    figures.append(f"{before:.1f} → {after:.1f}")
    if row["error_before"]:
      before, after = row["error_before"], row["error_after"]
      figures.append(f"{100 * before:.2f} % → {100 * after:.2f} %")
  missing = [figure for figure in figures if figure not in page.text]
  assert not missing
  titles = " ".join(page.attributes["title"])
  assert all(path in titles for path in results["distortion"])
  assert "accuracy fell" in titles


def test_table_of_layers_has_their_distortions(tmp_path, run):
  results = run["results"]
  distortion = results["distortion"]
  bare = run | {"results": results | {"distortion": {}}}
  without = Page(written(tmp_path, bare)).text
  # The chart shows each of them too.
  text_of_page = Page(written(tmp_path, run)).text
  for figure in map(text.percent, distortion.values()):
    assert text_of_page.count(figure) >= 2 + without.count(figure)


def test_page_of_a_large_network_folds_rows_and_loses_none(tmp_path, run):
  distortion = {f"params/{n}/kernel": 0.1 for n in range(60)}
  run["results"]["distortion"] = distortion
  page = Page(written(tmp_path, run))
  assert "36 more" in page.text
  assert distortion.keys() <= page.attributes["title"]


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
  run["results"]["versions"] = {hostile: hostile}
  run["config"] = {hostile: hostile, "model": {"name": hostile}}
  run["layers"] = [
    layer._replace(path=layer.path + hostile) for layer in run["layers"]
  ]
  run["results"]["distortion"] = {
    path + hostile: value
    for path, value in run["results"]["distortion"].items()
  }
  for row in run["groups"]:
    row |= {"group": hostile, "consumers": [hostile], "note": hostile}
  page = Page(written(tmp_path, run))
  assert not page.tags & {"script", "img"}
  assert "onload" not in page.attributes
  assert page.text.count(hostile) > len(run["layers"])


@pytest.mark.parametrize(
  ("name", "heading"),
  [
    ("distortion", "Distortion by layer"),
    ("groups", "Permutation"),
    ("history", "Training: loss"),
  ],
)
def test_what_is_empty_leaves_no_empty_section(tmp_path, run, name, heading):
  assert heading in Page(written(tmp_path, run)).text
  part = run["results"] if name in run["results"] else run
  part[name] = type(part[name])()
  assert heading not in Page(written(tmp_path, run)).text


def test_pictures_are_in_the_page(tmp_path, run):
  assert "Pictures" not in Page(written(tmp_path, run)).text
  run["pictures"] = [b"first", b"second"]
  page = Page(written(tmp_path, run))
  assert "Pictures" in page.text
  assert page.attributes["src"] == {
    f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    for picture in run["pictures"]
  }

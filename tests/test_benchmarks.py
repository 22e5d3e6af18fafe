"""Benchmarks make the folders of their results, before they measure."""

import json
import sys

from benchmarks import kmeans, study


def test_a_new_folder_of_pages_is_made(tmp_path, monkeypatch):
  folder = tmp_path / "new/docs"
  monkeypatch.setattr(
    sys, "argv", ["kmeans", "--docs", str(folder), "--shapes"]
  )
  monkeypatch.setattr(kmeans.importlib.util, "find_spec", lambda name: None)
  kmeans.main()
  assert (folder / "kmeans.md").exists()


def test_a_new_folder_of_records_is_made(tmp_path):
  file = tmp_path / "new/docs/runs.json"
  study.Records(file).add({"run": "a"})
  assert json.loads(file.read_text()) == [{"run": "a"}]

"""Holds the files of one run: config, checkpoints, metrics, results, model."""

import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from etils import epath

from pqf_jax import errors, report
from pqf_jax.pipeline import settings
from pqf_jax.runtime import checkpoint, distributed, files

Results = dict[str, Any]
# How processes find each other changes no result, so a run may be resumed with
# other values of these settings.
NOT_COMPARED = ("distributed", "distributed_timeout")


class Workspace:
  """A workdir that belongs to one config, once it is claimed.

  config.json  checkpoints/  metrics.jsonl  results.json  report.html
  model.safetensors  tensorboard/ (where asked for)
  """

  def __init__(self, workdir: str, config: ml_collections.ConfigDict):
    """Reads what the workdir holds; creates nothing yet.

    Raises:
      InputError: the workdir belongs to another config; says what differs.
    """
    path = files.absolute(workdir)
    if path.exists() and not path.is_dir():
      raise errors.InputError(f"the workdir {path} is a file; give a folder")
    self.checkpoints = checkpoint.Checkpoints(path)
    self.packed_file = path / "model.safetensors"
    self.report_file = path / "report.html"
    self._config_file = path / "config.json"
    self._metrics_file = path / "metrics.jsonl"
    self.results_file = path / "results.json"
    # As JSON reads it back, so that tuples and lists are alike.
    self._config = json.loads(json.dumps(config.to_dict()))
    self._curves = (
      report.TensorBoardWriter(path / "tensorboard")
      if config.tensorboard and distributed.is_lead()
      else None
    )
    if self._config_file.exists():
      stored = json.loads(self._config_file.read_text())
      _check_same(path, stored, self._config)

  def claim(self) -> None:
    """Creates the workdir, which belongs to this config from now on.

    Call it when nothing of the config can be refused any more, so that a
    corrected config may use the same workdir.
    """
    if distributed.is_lead():
      self._config_file.parent.mkdir(parents=True, exist_ok=True)
      report.write_json(self._config_file, self._config)
    distributed.check_shared(self._config_file)

  def results(self) -> Results | None:
    """Reads results.json; None before the run is finished."""
    if not self.results_file.exists():
      return None
    return json.loads(self.results_file.read_text())

  def write_results(self, results: Results) -> None:
    """Writes results.json, which marks the run as finished."""
    if distributed.is_lead():
      report.write_json(self.results_file, results)

  def log(self, record: dict[str, Any]) -> None:
    """Appends to metrics.jsonl, and to TensorBoard where asked for."""
    if distributed.is_lead():
      report.append_metric(self._metrics_file, record)
    if self._curves:
      self._curves.write(record)

  def resume_log(self, stage: str, step: int) -> None:
    """Removes the records that will be measured again from `step` on."""
    if distributed.is_lead():
      report.resume_metrics(self._metrics_file, stage, step)
    if self._curves:
      self._curves.resume(stage, step)

  def close(self) -> None:
    """Flushes TensorBoard's writer."""
    if self._curves:
      self._curves.close()

  def history(self) -> Sequence[Mapping[str, Any]]:
    """Reads all records of metrics.jsonl."""
    return report.read_metrics(self._metrics_file)


def code_digest() -> str:
  """Hashes the library's source files, so that processes can compare them."""
  folder = pathlib.Path(__file__).parents[1]
  digest = hashlib.sha256()
  for path in sorted(folder.rglob("*.py")):
    digest.update(path.read_bytes())
  return digest.hexdigest()[:16]


def _check_same(path: epath.Path, stored: Any, wanted: Any) -> None:
  before, now = settings.flatten(stored), settings.flatten(wanted)
  differences = [
    f"{name}: {before.get(name)!r} there, {now.get(name)!r} now"
    for name in sorted((before.keys() | now.keys()) - set(NOT_COMPARED))
    if before.get(name) != now.get(name)
  ]
  if differences:
    raise errors.InputError(
      f"the workdir {path} belongs to another config; use another --workdir "
      "or delete it. Different are:\n  " + "\n  ".join(differences)
    )

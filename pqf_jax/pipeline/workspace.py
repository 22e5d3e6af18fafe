"""Holds the files of one run: config, checkpoints, metrics, results, model."""

import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import IO, Any, Self

import ml_collections
from etils import epath

from pqf_jax import errors, report
from pqf_jax.core import storage
from pqf_jax.pipeline import settings
from pqf_jax.runtime import checkpoint, distributed, files, progress
from pqf_jax.runtime import results as sealing

Results = dict[str, Any]
# How processes find each other, and programs, changes no result, and how
# numbers are stored only what is packed at the end, so a run may be resumed
# with other values of these settings.
NOT_COMPARED = (
  *("distributed", "distributed_timeout"),
  *("compilation_cache", "compilation_cache_megabytes"),
  *(f"storage.{name}" for name in storage.CHOICES),
)
# Field of config.json with the digests of weights and data.
SHA256 = "sha256"


class Workspace:
  """A workdir that belongs to one config, once it is claimed.

  config.json  checkpoints/  metrics.jsonl  results.json  report.html  lock
  model.safetensors  tensorboard/ (where asked for)

  As a context it is closed at the end.
  """

  def __init__(self, workdir: str, config: ml_collections.ConfigDict):
    """Reads what the workdir holds; creates nothing yet.

    Raises:
      InputError: the workdir belongs to another config (says what differs), or
        it does not say any more to which.
    """
    path = files.absolute(workdir)
    if path.exists() and not path.is_dir():
      raise errors.InputError(f"the workdir {path} is a file; give a folder")
    self.checkpoints = checkpoint.Checkpoints(path)
    self.packed_file = path / "model.safetensors"
    self.report_file = path / "report.html"
    self._config_file = path / "config.json"
    self._metrics_file = path / "metrics.jsonl"
    self.results_file = path / sealing.NAME
    # As JSON reads it back, so that tuples and lists are alike.
    self._config = json.loads(json.dumps(config.to_dict()))
    self._curves = (
      report.TensorBoardWriter(path / "tensorboard")
      if config.tensorboard and distributed.is_lead()
      else None
    )
    self._lock: IO[str] | None = None
    self._check(self._config)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *error: object) -> None:
    self.close()

  def claim(self, inputs: Mapping[str, str] | None = None) -> None:
    """Creates and locks the workdir, which belongs to this config from now on.

    Call it when nothing of the config can be refused any more, so that a
    corrected config may use the same workdir. In a bucket there are no locks.

    Args:
      inputs: {name: sha256} of what the stages are made from; None: the run has
        no stages, so that other content under the same name does not matter.

    Raises:
      InputError: the workdir belongs to another config or other inputs, or
        another process works in it.
    """
    wanted = (
      self._config if inputs is None else self._config | {SHA256: dict(inputs)}
    )
    if inputs is not None:
      distributed.check_agreement({"sha256 of the inputs": wanted[SHA256]})
    problems = []
    if distributed.is_lead():
      folder = self._config_file.parent
      folder.mkdir(parents=True, exist_ok=True)
      try:
        self._lock = files.lock(folder / "lock")
        self._check(wanted)
      except errors.InputError as error:
        problems.append(str(error))
      else:
        if self._lock is None:
          progress.say(f"{folder} cannot be locked: run only one command there")
        report.write_json(self._config_file, wanted)
    for problem in distributed.gather_lists(problems):
      raise errors.InputError(problem)
    distributed.check_shared(self._config_file)

  def results(self) -> Results | None:
    """Reads results.json; None unless the run is finished and all is there.

    A file that is packed with another storage than the config's does not count.

    Raises:
      InputError: the file is not one that `write_results` wrote.
    """
    if not self.results_file.exists():
      return None
    results = files.read_json(self.results_file)
    stored = results.pop(sealing.SHA256, None)
    if stored is None:
      raise errors.InputError(
        f"{self.results_file} is not of this version of the program: it has no "
        f"field {sealing.SHA256!r}; move it elsewhere, and the same command "
        "makes it again from the finished stages"
      )
    digest = sealing.digest(results, self.packed_file)
    whole = stored == digest and self.report_file.exists()
    if whole and results.get("storage") == self._config["storage"]:
      return results
    progress.say(
      f"the results in {self.results_file.parent} are not what was written, or "
      "of another storage; they are made again from the finished stages"
    )
    return None

  def write_results(self, results: Results) -> None:
    """Writes results.json, which marks the run as finished."""
    if distributed.is_lead():
      plain = report.plain(results)
      digest = sealing.digest(plain, self.packed_file)
      report.write_json(self.results_file, plain | {sealing.SHA256: digest})

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
    """Flushes TensorBoard's writer, and lets others use the workdir."""
    if self._curves:
      self._curves.close()
    if self._lock:
      self._lock.close()

  def history(self) -> Sequence[Mapping[str, Any]]:
    """Reads all records of metrics.jsonl."""
    return report.read_metrics(self._metrics_file)

  def _check(self, wanted: Mapping[str, Any]) -> None:
    """Refuses a workdir of another run."""
    path = self._config_file.parent
    if self._config_file.exists():
      stored = files.read_json(self._config_file)
      if SHA256 not in wanted:
        stored.pop(SHA256, None)
      _check_same(path, stored, wanted)
      return
    # Stage 0 may be copied from elsewhere; what comes after is of one run.
    names = [n for n in self.checkpoints.stages() if n != "dense"]
    names += ["results.json"] if self.results_file.exists() else []
    if names:
      raise errors.InputError(
        f"the workdir {path} holds {', '.join(names)}, but no config.json that "
        "says of which run; put it back, or use another --workdir"
      )


def code_digest() -> str:
  """Hashes the library's source files, so that processes can compare them."""
  folder = pathlib.Path(__file__).parents[1]
  digest = hashlib.sha256()
  for path in sorted(folder.rglob("*.py")):
    digest.update(path.read_bytes())
  return digest.hexdigest()[:16]


def _check_same(
  path: epath.Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
  before, now = settings.flatten(stored), settings.flatten(wanted)
  differences = [
    f"{name}: {before.get(name)!r} there, {now.get(name)!r} now"
    for name in sorted((before.keys() | now.keys()) - set(NOT_COMPARED))
    if before.get(name) != now.get(name)
  ]
  if differences:
    raise errors.InputError(
      f"the workdir {path} belongs to another config, or to another content of "
      "the files that it names; use another --workdir. Different are:\n  "
      + "\n  ".join(differences)
    )

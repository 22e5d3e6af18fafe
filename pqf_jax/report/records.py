"""The files of a run that a program reads: JSON and JSON lines.

Every write leaves either the old file or the new one, and a log of metrics
survives a crash in the middle of a line. Call these on process 0 only.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from pqf_jax import errors
from pqf_jax.report import schema
from pqf_jax.runtime import files

Path = str | os.PathLike[str]


def write_json(path: Path, value: Mapping[str, Any]) -> None:
  """Writes `results.json` or `config.json` at once or not at all.

  Args:
    path: of the file; its folder must exist.
    value: what `json` writes, and scalars or arrays of NumPy or JAX. What is
      neither becomes its text, and NaN and infinity become null.
  """
  write_text(path, json.dumps(_plain(value), indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
  """Writes a file at once or not at all, in UTF-8."""
  files.write(path, text.encode())


def append_metric(path: Path, record: Mapping[str, Any]) -> None:
  """Adds one line to a log of metrics, which is made if there is none.

  The half line that a crash may have left is cut off first.

  Args:
    path: of `metrics.jsonl`.
    record: a `schema.MetricRecord`; device scalars are read.
  """
  line = json.dumps(_plain(record)) + "\n"
  if files.is_remote(path):
    # Objects of a bucket cannot grow; this one is small.
    log = epath.Path(path)
    before = log.read_bytes() if log.exists() else b""
    files.write(log, before + line.encode())
    return
  with open(path, "ab+") as file:
    if file.tell():
      file.seek(-1, os.SEEK_END)
      if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
    file.write(line.encode())


def read_metrics(path: Path) -> list[schema.MetricRecord]:
  """Reads a log of metrics.

  Args:
    path: of `metrics.jsonl`; a missing file is an empty log.

  Returns:
    Its records in order; a last line without its end is left out.

  Raises:
    InputError: a whole line is no record, so that the file is damaged.
  """
  log = epath.Path(path)
  if not log.exists():
    return []
  *lines, _ = log.read_bytes().split(b"\n")
  records = []
  for number, line in enumerate(lines, 1):
    try:
      records.append(json.loads(line))
    except ValueError as error:
      raise errors.InputError(
        f"{log} line {number} is not a JSON record ({error}); remove the "
        "line, or the file to start the log again"
      ) from error
  return records


def resume_metrics(path: Path, stage: str, step: int) -> None:
  """Forgets what a stage that starts again at `step` will measure again.

  Args:
    path: of `metrics.jsonl`; may be missing.
    stage: whose records at `step` and later are dropped.
    step: first step that will be done again; 0 drops the whole stage.
  """
  if not epath.Path(path).exists():
    return
  kept = (
    json.dumps(record) + "\n"
    for record in read_metrics(path)
    if record["stage"] != stage or record["step"] < step
  )
  write_text(path, "".join(kept))


def _plain(value: Any) -> Any:
  text = json.dumps(value, default=_as_builtin)
  # JSON has no NaN: other readers refuse a file that says it.
  return json.loads(text, parse_constant=lambda name: None)


def _as_builtin(value: Any) -> Any:
  return value.tolist() if hasattr(value, "tolist") else str(value)

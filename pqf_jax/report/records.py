"""Writes and reads the JSON files of a run.

Every write leaves either the old file or the new one, and a log of metrics
survives a crash in the middle of a line. Call these on process 0 only.
"""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from pqf_jax import errors
from pqf_jax.report import schema
from pqf_jax.runtime import files


def write_json(path: epath.PathLike, value: Mapping[str, Any]) -> None:
  """Writes `results.json` or `config.json` whole or not at all.

  Args:
    path: of the file.
    value: JSON data, in which scalars and arrays of NumPy or JAX become numbers
      and lists, other objects their text, NaN and infinity null.
  """
  files.write(path, (json.dumps(plain(value), indent=2) + "\n").encode())


def append_metric(path: epath.PathLike, record: schema.Record) -> None:
  """Appends one line to a log of metrics, or starts the log.

  Call `resume_metrics` first in every stage: it removes the half line that a
  crash may have left.

  Args:
    path: of `metrics.jsonl`.
    record: see `schema.Record`; its values may be device scalars.

  Raises:
    InputError: the disk is full.
  """
  line = (json.dumps(plain(record)) + "\n").encode()
  log = epath.Path(path)
  files.check_regular(log)
  if files.is_remote(log):
    # An object in a bucket cannot grow, so it is written anew; it is small.
    files.write(log, (log.read_bytes() if log.exists() else b"") + line)
  else:
    with files.name_full_disk(log), log.open("ab") as file:
      file.write(line)


def read_metrics(path: epath.PathLike) -> list[schema.Record]:
  """Reads a log of metrics.

  Args:
    path: of `metrics.jsonl`; a missing file is an empty log.

  Returns:
    Its records in order, without a last line that is incomplete.

  Raises:
    InputError: a complete line is not a record, so the file is damaged.
  """
  log = epath.Path(path)
  if not log.exists():
    return []
  files.check_regular(log)
  *lines, _ = log.read_bytes().split(b"\n")
  records: list[schema.Record] = []
  for number, line in enumerate(lines, 1):
    try:
      record = json.loads(line)
    except (ValueError, RecursionError):
      record = None
    fields = record if isinstance(record, dict) else {}
    if not isinstance(fields.get("stage"), str) or not isinstance(
      fields.get("step"), int
    ):
      raise errors.InputError(
        f"{log} line {number} is not a JSON record with stage and step, but "
        f"{line[:40]!r}; remove this line, or the whole file to start the log "
        "again"
      )
    records.append(fields)
  return records


def resume_metrics(path: epath.PathLike, stage: str, step: int) -> None:
  """Removes the records that a resumed stage will write again, and a half line.

  Args:
    path: of `metrics.jsonl`; may be missing.
    stage: its records at `step` and later are removed.
    step: first step that will be done again; 0 removes the whole stage.
  """
  if not epath.Path(path).exists():
    return
  kept = (
    json.dumps(record) + "\n"
    for record in read_metrics(path)
    if record["stage"] != stage or record["step"] < step
  )
  files.write(path, "".join(kept).encode())


def plain(value: Any) -> Any:
  """Returns the value as `write_json` writes and a reader reads it."""
  text = json.dumps(value, default=_as_builtin)
  # JSON has no NaN: other readers would refuse the file.
  return json.loads(text, parse_constant=lambda name: None)


def _as_builtin(value: Any) -> Any:
  return value.tolist() if hasattr(value, "tolist") else str(value)

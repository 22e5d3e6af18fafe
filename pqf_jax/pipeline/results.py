"""What a finished run tells: results.json and report.html."""

import datetime
import pathlib
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import jax

import pqf_jax
from pqf_jax import report
from pqf_jax.core import plan as plans
from pqf_jax.pipeline import job as jobs
from pqf_jax.runtime import checkpoint


def make_results(
  job: jobs.Job,
  size: plans.SizeReport,
  payload_bytes: int,
  records: dict[str, checkpoint.Record],
) -> dict[str, Any]:
  """Returns the content of results.json; see `report.schema.Results`.

  Args:
    job: what the stages share.
    size: predicted by the plan.
    payload_bytes: counted on the packed buffers.
    records: {stage: record with 'evaluation' and 'seconds'}; 'packed' is the
      evaluation of the file.
  """
  figures = {
    f"{name}_{stage}": value
    for stage, record in records.items()
    for name, value in record["evaluation"].items()
    if name != "images"
  }
  file_bytes = job.files.packed_file.stat().length
  return {
    "name": job.config.name,
    "command": command(sys.argv),
    "versions": versions(),
    "date": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
    "seed": job.config.seed,
    "device": jax.devices()[0].device_kind,
    "images": records["packed"]["evaluation"]["images"],
    "unit": getattr(job.task, "unit", "images"),
    "metrics": {
      name: label
      for name, label in job.task.metrics.items()
      if name not in job.loaded.hidden
    },
    **figures,
    "distortion": records["quantized"]["distortion"],
    "dense_bytes": size.dense_bytes,
    "payload_bytes": payload_bytes,
    "file_bytes": file_bytes,
    "ratio": size.dense_bytes / file_bytes,
    "seconds": {stage: record["seconds"] for stage, record in records.items()},
    "file": job.files.packed_file.name,
    "storage": job.config.storage.to_dict(),
  }


def command(argv: Sequence[str]) -> str:
  """Returns the command line that started a program with these arguments."""
  script = pathlib.Path(argv[0])
  if script.name == "pqf-jax":  # as it is installed
    program = [script.name]
  elif script.parts[-2:] == ("pqf_jax", "__main__.py"):
    program = ["python", "-m", "pqf_jax"]
  else:
    program = ["python", argv[0]]
  return shlex.join([*program, *argv[1:]])


def versions() -> dict[str, str]:
  """Returns the versions of what the figures of a run depend on."""
  ours = {"pqf_jax": pqf_jax.__version__, "python": platform.python_version()}
  names = ("jax", "jaxlib", "flax", "optax", "numpy")
  return ours | {name: metadata.version(name) for name in names}


def write_report(
  job: jobs.Job,
  layers: Sequence[plans.LayerSize],
  records: dict[str, checkpoint.Record],
  results: dict[str, Any],
  pictures: Sequence[bytes],
) -> None:
  """Writes report.html."""
  report.write_html(
    job.files.report_file,
    results,
    config=job.config.to_dict(),
    layers=layers,
    inputs=[
      (leaf.shape, leaf.dtype.name) for leaf in job.task.sample(job.config)
    ],
    # No order changes the sub-vectors of the other groups.
    groups=[row for row in records["permuted"]["groups"] if row["consumers"]],
    history=job.files.history(),
    pictures=pictures,
  )

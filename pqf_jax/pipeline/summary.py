"""Converts the figures of a run to plain data, for results.json and report."""

import datetime
import shlex
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import ml_collections
from etils import epath

from pqf_jax import permute
from pqf_jax.core import plan as plans
from pqf_jax.report import schema
from pqf_jax.runtime import checkpoint


def plan_rows(size: plans.SizeReport) -> list[schema.PlanRow]:
  """Builds one row a stored variable; see `report.schema.PlanRow`."""
  return [
    {
      "path": layer.path,
      "shape": layer.shape,
      "length": layer.length,
      "num_codes": layer.num_codes,
      "num_subvectors": layer.num_subvectors,
      "bytes": layer.payload_bytes,
      "bits_per_weight": layer.bits_per_weight,
    }
    for layer in size.layers
  ]


def layer_rows(
  size: plans.SizeReport, distortion: Mapping[str, float]
) -> list[schema.LayerRow]:
  """Builds one row a compressed kernel; see `report.schema.LayerRow`."""
  return [
    {
      "path": layer.path,
      "shape": layer.shape,
      "bytes": layer.payload_bytes,
      "distortion": distortion[layer.path],
    }
    for layer in size.layers
    if layer.num_codes
  ]


def group_rows(
  groups: Iterable[permute.GroupReport],
) -> list[schema.GroupRow]:
  """Builds one row a channel group; see `report.schema.GroupRow`."""
  return [
    {
      "group": group.group,
      "consumers": list(group.consumers),
      "size": group.size,
      "log_det_before": group.log_det_before,
      "log_det_after": group.log_det_after,
      "error_before": group.error_before,
      "error_after": group.error_after,
      "accepted": group.accepted,
      "note": group.note,
    }
    for group in groups
  ]


def results(
  config: ml_collections.ConfigDict,
  metrics: Mapping[str, str],
  size: plans.SizeReport,
  payload_bytes: int,
  packed_file: epath.Path,
  records: Mapping[str, checkpoint.Record],
) -> dict[str, Any]:
  """Builds results.json; see `report.schema.Results`.

  Args:
    config: of the run.
    metrics: of the task, {name: label}.
    size: predicted by the plan.
    payload_bytes: counted on the packed buffers.
    packed_file: its size on disk gives the ratio.
    records: {stage: record with 'evaluation' and 'seconds'}; 'packed' is the
      evaluation of the file.
  """
  figures = {
    f"{name}_{stage}": value
    for stage, record in records.items()
    for name, value in record["evaluation"].items()
    if name != "images"
  }
  file_bytes = packed_file.stat().length
  return {
    "name": config.name,
    "command": shlex.join(["python", *sys.argv]),
    "date": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
    "seed": config.seed,
    "device": jax.devices()[0].device_kind,
    "images": records["packed"]["evaluation"]["images"],
    "metrics": dict(metrics),
    **figures,
    "dense_bytes": size.dense_bytes,
    "payload_bytes": payload_bytes,
    "file_bytes": file_bytes,
    "ratio": size.dense_bytes / file_bytes,
    "seconds": {stage: record["seconds"] for stage, record in records.items()},
    "file": packed_file.name,
  }

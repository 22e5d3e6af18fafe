"""The plain data that a report is made of.

Everything here is what `json` reads back, so that a report can be made again
from the files of a finished run. Every field may be missing: a run that only
evaluates has no plan, and one that starts from weights has no training.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

STAGES = {
  "dense": "dense",
  "permuted": "permuted",
  "quantized": "quantized",
  "finetuned": "fine-tuned",
  "packed": "packed",
}
METRICS = {
  "top1": "top-1",
  "top5": "top-5",
  "box_ap": "box AP",
  "mask_ap": "mask AP",
}

Results = Mapping[str, Any]
"""What a run measured.

    name           of the run, such as 'resnet18 digits'
    command        that repeats it
    date, device   as text;  seed  integer
    images         test images
    <m>_<s>        fraction 0..1 of metric m of `METRICS` after stage s of
                   `STAGES`, such as top1_dense
    dense_bytes    of the float32 network
    payload_bytes  of codes, codebooks and the rest
    file_bytes     of the packed file, header included
    ratio          dense_bytes / file_bytes
    seconds        {stage: seconds}
    file           name of the packed file
"""


class PlanRow(TypedDict, total=False):
  """One variable of the plan.

  Attributes:
    path: of the variable.
    shape: dense shape.
    block: length D of a sub-vector; 0 where it stays dense.
    num_codes: codewords K; 0 where it stays dense.
    num_codewords_used: codewords that some code names, once quantized.
    codes: sub-vectors N; 0 where it stays dense.
    bytes: in the packed file.
    bits_per_weight: 8 bytes / weights.
    kept: 'codebook + codes' or 'dense'.
  """

  path: str
  shape: tuple[int, ...]
  block: int
  num_codes: int
  num_codewords_used: int
  codes: int
  bytes: int
  bits_per_weight: float
  kept: str


class LayerRow(TypedDict, total=False):
  """One quantized kernel.

  Attributes:
    path: of the kernel.
    shape: dense shape.
    distortion: mean squared error a weight / variance of the weights, 0..1.
    bytes: in the packed file.
  """

  path: str
  shape: tuple[int, ...]
  distortion: float
  bytes: int


class GroupRow(TypedDict, total=False):
  """One channel group that was permuted.

  Attributes:
    group: its name.
    children: paths of the kernels that read its channels.
    size: channels.
    log_det_before: natural log-determinant of the covariance of sub-vectors.
    log_det_after: the same in the order that was found.
    error_before: squared error of a short k-means over the mean square of the
      weights, 0..1; 0 where it was not asked for.
    error_after: the same in the order that was found.
    accepted: whether that order was taken.
    note: why not, or anything else worth saying.
  """

  group: str
  children: list[str]
  size: int
  log_det_before: float
  log_det_after: float
  error_before: float
  error_after: float
  accepted: bool
  note: str


class MetricRecord(TypedDict, total=False):
  """What was measured at one step of a stage.

  Attributes:
    stage: 'train' or 'finetune'.
    step: counted from the start of the stage.
    epoch: step / steps of one epoch.
    loss: of the batch.
    learning_rate: of the step.
    images_per_second: since the record before.
    top1: of an evaluation, 0..1; not in every record.
  """

  stage: str
  step: int
  epoch: float
  loss: float
  learning_rate: float
  images_per_second: float
  top1: float


class Score(NamedTuple):
  """One metric after one stage.

  Attributes:
    stage: a key of `STAGES`.
    value: fraction 0..1.
    gap: value - that of the dense network, or None where there is none.
  """

  stage: str
  value: float
  gap: float | None


def metrics_of(record: Mapping[str, Any]) -> dict[str, float]:
  """What a record says of `METRICS`."""
  return {name: record[name] for name in METRICS if name in record}


def dense_bytes(row: PlanRow | LayerRow) -> int:
  """Bytes of a variable in float32."""
  return 4 * math.prod(row["shape"])


def scores(results: Results) -> dict[str, list[Score]]:
  """The figures that were measured, {metric: one `Score` a stage}."""
  found = {}
  for metric in METRICS:
    dense = results.get(f"{metric}_dense")
    found[metric] = [
      Score(stage, value, None if dense is None else value - dense)
      for stage in STAGES
      if (value := results.get(f"{metric}_{stage}")) is not None
    ]
  return {metric: rows for metric, rows in found.items() if rows}

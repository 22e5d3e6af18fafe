"""The plain data that a report is made of.

JSON keeps all of it, so a report can be made again from the files of a finished
run. Every field may be missing: a run that only evaluates has no plan, and one
that starts from weights has no training.
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

Results = Mapping[str, Any]
"""Content of results.json.

    name           of the run, such as 'resnet18 digits'
    command        that repeats it
    date, device   as text;  seed  integer
    images         test images
    metrics        {metric: label}, such as {"top1": "top-1"}, of the metrics
                   that tables and charts show, in their order; the first one is
                   the headline
    <m>_<s>        fraction 0..1 of metric m after stage s of `STAGES`, such as
                   top1_dense; metrics without a label are kept, not shown
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
    length: D, weights of a sub-vector; 0 where the variable stays dense.
    num_codes: K, codewords of the codebook; 0 where the variable stays dense.
    num_subvectors: N; 0 where the variable stays dense.
    bytes: in the packed file.
    bits_per_weight: 8 bytes / weights.
  """

  path: str
  shape: tuple[int, ...]
  length: int
  num_codes: int
  num_subvectors: int
  bytes: int
  bits_per_weight: float


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
    consumers: paths of the kernels that read its channels.
    size: channels.
    log_det_before: natural log-determinant of the covariance of sub-vectors.
    log_det_after: the same after the permutation.
    error_before: squared error of a short k-means over the mean square of the
      weights, 0..1; 0 where no k-means was run.
    error_after: the same after the permutation.
    accepted: whether the permutation was applied.
    note: why it was not, or a warning.
  """

  group: str
  consumers: list[str]
  size: int
  log_det_before: float
  log_det_after: float
  error_before: float
  error_after: float
  accepted: bool
  note: str


Record = Mapping[str, Any]
"""One line of metrics.jsonl, measured at one step of a training stage.

    stage              'train' or 'finetune'
    step               counted from the start of the stage
    epoch              step / steps of one epoch
    loss               of the batch
    images_per_second  since the record before
    <metric>           of an evaluation, 0..1; not in every record
"""


class Score(NamedTuple):
  """One metric after one stage.

  Attributes:
    stage: a key of `STAGES`.
    value: fraction 0..1.
    gap: value - the dense network's, or None where that is unknown.
  """

  stage: str
  value: float
  gap: float | None


def dense_bytes(row: PlanRow | LayerRow) -> int:
  """Returns the bytes of a variable in float32."""
  return 4 * math.prod(row["shape"])


def labels(results: Results) -> Mapping[str, str]:
  """Returns {metric: label} of the metrics to show, the headline one first."""
  return results.get("metrics") or {}


def scores(results: Results) -> dict[str, list[Score]]:
  """Returns {label: one `Score` a stage} of the metrics that have a value."""
  by_label = {}
  for metric, label in labels(results).items():
    dense = results.get(f"{metric}_dense")
    rows = [
      Score(stage, value, None if dense is None else value - dense)
      for stage in STAGES
      if (value := results.get(f"{metric}_{stage}")) is not None
    ]
    if rows:
      by_label[label] = rows
  return by_label

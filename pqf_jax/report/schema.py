"""The plain data that a report is made of, as a run's JSON files keep it."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from pqf_jax.core import plan
from pqf_jax.runtime.results import STAGES as STAGES

Results = Mapping[str, Any]
"""Content of results.json.

    name           of the run, such as 'resnet18 digits'
    command        that repeats it
    versions       {name: version} of the libraries
    date, device   as text;  seed  integer
    images         test images, or other samples
    unit           what these are: 'images'
    metrics        {metric: label}, such as {"top1": "top-1"}, of the metrics
                   that tables and charts show, in their order
    <m>_<s>        fraction 0..1 of metric m after stage s of `STAGES`, such as
                   top1_dense; metrics without a label are kept, not shown
    distortion     {path: mean squared error / variance of the weights} of
                   each quantized kernel, before fine-tuning
    dense_bytes    of the float32 network
    payload_bytes  of codes, codebooks and the rest
    file_bytes     of the packed file, header included
    ratio          dense_bytes / file_bytes
    seconds        {stage: seconds}
    file           name of the packed file
    storage        {part: type} of its numbers, see `Storage`
    sha256         of all this and of the packed file
"""

Group = Mapping[str, Any]
"""The fields of a `permute.GroupReport` by name, for one channel group."""

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
    value: fraction 0..1.
    gap: value - the dense network's; None for that network itself, and where
      its value is unknown.
  """

  value: float
  gap: float | None


def scores(results: Results) -> dict[str, dict[str, Score]]:
  """Returns {label: {stage: `Score`}} of the metrics that have a value."""
  by_label = {}
  for metric, label in results["metrics"].items():
    dense = results.get(f"{metric}_dense")
    by_stage = {
      stage: Score(
        value, None if dense is None or stage == "dense" else value - dense
      )
      for stage in STAGES
      if (value := results.get(f"{metric}_{stage}")) is not None
    }
    if by_stage:
      by_label[label] = by_stage
  return by_label


def dense_bytes(layer: plan.LayerSize) -> int:
  """Returns the bytes of a variable in float32."""
  return 4 * math.prod(layer.shape)

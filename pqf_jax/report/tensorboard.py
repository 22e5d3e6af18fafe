"""Writes metric records for TensorBoard, where a config asks for it."""

import importlib
import os
from typing import Any

from pqf_jax import errors
from pqf_jax.report import schema
from pqf_jax.runtime import files

# Fields of a record that are no curve: `images` is the size of the test set.
NOT_CURVES = ("stage", "step", "epoch", "images")


class TensorBoardWriter:
  """Writes metric records as curves, one TensorBoard run a stage.

  Args:
    directory: where the runs are kept.

  Raises:
    InputError: tensorboardX is not installed, or the folder is in a bucket.
  """

  def __init__(self, directory: str | os.PathLike[str]) -> None:
    try:
      self._library = importlib.import_module("tensorboardX")
    except ImportError as error:
      raise errors.InputError(
        "config.tensorboard=True needs the package tensorboardX, which is "
        "not installed; run `pip install tensorboardX`, or leave it False "
        "and read metrics.jsonl"
      ) from error
    if files.is_remote(directory):
      raise errors.InputError(
        f"config.tensorboard=True writes to local disks only, but its "
        f"folder would be {directory}; leave it False and read metrics.jsonl"
      )
    self._directory = directory
    self._runs: dict[str, Any] = {}

  def resume(self, stage: str, step: int) -> None:
    """Starts or continues a stage; hides its points from `step` on."""
    folder = os.path.join(self._directory, stage)
    self._runs[stage] = self._library.SummaryWriter(folder, purge_step=step)

  def write(self, record: schema.Record) -> None:
    """Adds a point to the curve of every number in the record.

    Its stage must have been started by `resume`.
    """
    run = self._runs[record["stage"]]
    for name, value in record.items():
      if name not in NOT_CURVES and value is not None:
        run.add_scalar(name, value, record["step"])

  def close(self) -> None:
    """Writes the points that the library still buffers."""
    for run in self._runs.values():
      run.close()

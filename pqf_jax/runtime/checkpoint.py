"""Saves and restores stages: arrays by orbax, with a JSON record beside them.

checkpoints/permute/         arrays, written by orbax (atomic rename)
checkpoints/permute.json     the stage's record, written last: the stage is done
checkpoints/finetune@1200/   progress inside a stage, at step 1200

Trees that are saved are equal on all processes, local or replicated; all
processes save the arrays, process 0 writes the record. Restored trees are
local, and the numbers of processes and devices may differ from the saving run.
"""

import json
from collections.abc import Callable, Iterable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from pqf_jax import errors
from pqf_jax.runtime import distributed, files

PyTree = Any
Record = dict[str, Any]


class Checkpoints:
  """The checkpoints of one run, in `<workdir>/checkpoints`."""

  def __init__(self, workdir: epath.PathLike):
    """Creates nothing on disk; the workdir may be in a bucket."""
    # Orbax needs absolute paths.
    self._root = files.absolute(workdir) / "checkpoints"

  def restore_or_compute(
    self,
    stage: str,
    target: PyTree,
    compute: Callable[[], tuple[PyTree, Record]],
  ) -> tuple[PyTree, Record]:
    """Restores the result of a finished stage, or computes and saves it.

    Args:
      stage: name, one word.
      target: the expected tree, of arrays or `jax.ShapeDtypeStruct`s.
      compute: () -> (tree, JSON record), called if no checkpoint exists.

    Raises:
      InputError: the checkpoint does not fit the target.
    """
    stored = self.restore(stage, target)
    if stored is not None:
      return stored
    tree, record = compute()
    self.save(stage, tree, record)
    self.drop_progress(stage)
    return tree, record

  def restore(self, name: str, target: PyTree) -> tuple[PyTree, Record] | None:
    """Returns (tree, record) of a finished save, or None.

    Raises:
      InputError: the checkpoint does not fit the target.
    """
    sidecar = self._root / f"{name}.json"
    if not sidecar.exists():
      return None
    # Without shardings orbax restores only to the devices of the saving run.
    target = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=distributed.replicated()
      ),
      target,
    )
    with ocp.StandardCheckpointer() as checkpointer:
      try:
        tree = distributed.unreplicate(
          checkpointer.restore(self._root / name, target)
        )
      except (ValueError, FileNotFoundError, KeyError) as error:
        raise errors.InputError(
          f"the checkpoint {self._root / name} does not fit this run or is "
          f"damaged ({str(error).splitlines()[0]}); delete {self._root} to "
          "compute it again, or use another --workdir"
        ) from error
    return tree, json.loads(sidecar.read_text())

  def save(self, name: str, tree: PyTree, record: Record) -> None:
    """Saves arrays, then the record, without which they are ignored.

    Raises:
      InputError: the disk is full.
    """
    # Checked first: on a full disk tensorstore's threads print tracebacks.
    if distributed.is_lead():
      self._root.mkdir(parents=True, exist_ok=True)
      num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
      files.check_space(self._root, num_bytes)
    # With several processes, orbax refuses arrays of a single one.
    if jax.process_count() > 1:
      tree = distributed.replicate(tree)
    with ocp.StandardCheckpointer() as checkpointer:
      try:
        checkpointer.save(self._root / name, tree, force=True)
        checkpointer.wait_until_finished()
      except ValueError as error:
        # The error of tensorstore on a full disk.
        if "RESOURCE_EXHAUSTED" in str(error):
          raise files.disk_full(self._root / name) from error
        raise
    if distributed.is_lead():
      record_file = self._root / f"{name}.json"
      files.write(record_file, json.dumps(record, indent=2).encode())
    distributed.barrier(f"saved {name}")

  def save_progress(
    self, stage: str, step: int, tree: PyTree, record: Record
  ) -> None:
    """Saves the state inside a stage and removes older states."""
    older = self._progress(stage)
    self.save(f"{stage}@{step}", tree, record)
    older.pop(step, None)
    self._remove(older.values())

  def restore_progress(
    self, stage: str, target: PyTree
  ) -> tuple[PyTree, Record] | None:
    """Returns the latest (tree, record) inside a stage, or None."""
    saved = self._progress(stage)
    return self.restore(saved[max(saved)], target) if saved else None

  def drop_progress(self, stage: str) -> None:
    """Removes the states inside a stage; call it when the stage is saved."""
    self._remove(self._progress(stage).values())

  def _progress(self, stage: str) -> dict[int, str]:
    """Returns {step: name} of the states inside a stage."""
    names = [path.stem for path in self._root.glob(f"{stage}@*.json")]
    return {int(name.partition("@")[2]): name for name in names}

  def _remove(self, names: Iterable[str]) -> None:
    for name in names if distributed.is_lead() else ():
      # The record first: without it the arrays are ignored.
      (self._root / f"{name}.json").unlink()
      (self._root / name).rmtree()

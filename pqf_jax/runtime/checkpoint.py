"""Checkpoints of the stages: orbax for the arrays, JSON beside them.

checkpoints/permute/         arrays, written by orbax (atomic rename)
checkpoints/permute.json     the stage's record, written last: it is done
checkpoints/finetune@1200/   progress inside a stage, at step 1200

Trees are equal on all processes, local or replicated; all of them save, the
first one writes the records. What comes back is local, on however many
processes and devices.
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
    """Args: workdir: any path; orbax itself needs it absolute."""
    self._root = files.absolute(workdir) / "checkpoints"

  def restore_or_compute(
    self,
    stage: str,
    target: PyTree,
    compute: Callable[[], tuple[PyTree, Record]],
  ) -> tuple[PyTree, Record]:
    """The result of a stage: from its checkpoint if it is done, else computed.

    Args:
      stage: name, one word.
      target: arrays or `jax.ShapeDtypeStruct`s of the structure expected.
      compute: () -> (tree, JSON record), called where nothing is stored.

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
    """(tree, record) of a finished save, or None."""
    sidecar = self._root / f"{name}.json"
    if not sidecar.exists():
      return None
    # Without shardings orbax insists on the devices that it was saved on.
    target = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=distributed.replicated()
      ),
      target,
    )
    with ocp.StandardCheckpointer() as checkpointer:
      try:
        tree = distributed.local(
          checkpointer.restore(self._root / name, target)
        )
      except (ValueError, FileNotFoundError, KeyError) as error:
        raise errors.InputError(
          f"the checkpoint {self._root / name} does not fit this run or is "
          f"damaged ({str(error).splitlines()[0]}); delete {self._root} to "
          "compute it anew, or use another --workdir"
        ) from error
    return tree, json.loads(sidecar.read_text())

  def save(self, name: str, tree: PyTree, record: Record) -> None:
    """Saves arrays, then the record that makes them count."""
    # Asked before: where it fails, tensorstore's threads print tracebacks.
    if distributed.is_lead():
      self._root.mkdir(parents=True, exist_ok=True)
      num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
      files.check_space(self._root, num_bytes)
    # Orbax refuses arrays of one process where there are several.
    if jax.process_count() > 1:
      tree = distributed.replicate(tree)
    with ocp.StandardCheckpointer() as checkpointer:
      try:
        checkpointer.save(self._root / name, tree, force=True)
        checkpointer.wait_until_finished()
      except ValueError as error:
        # Tensorstore's own error for a full disk.
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
    """Saves the state inside a stage and drops the older ones."""
    older = self._progress(stage)
    self.save(f"{stage}@{step}", tree, record)
    self._remove(name for at, name in older.items() if at != step)

  def restore_progress(
    self, stage: str, target: PyTree
  ) -> tuple[PyTree, Record] | None:
    """The latest state inside a stage, or None."""
    steps = self._progress(stage)
    return self.restore(steps[max(steps)], target) if steps else None

  def drop_progress(self, stage: str) -> None:
    """Removes the states inside a stage, once the stage itself is saved."""
    self._remove(self._progress(stage).values())

  def _progress(self, stage: str) -> dict[int, str]:
    names = [path.stem for path in self._root.glob(f"{stage}@*.json")]
    return {int(name.partition("@")[2]): name for name in names}

  def _remove(self, names: Iterable[str]) -> None:
    for name in names if distributed.is_lead() else ():
      # The record first: without it the arrays count for nothing.
      (self._root / f"{name}.json").unlink()
      (self._root / name).rmtree()

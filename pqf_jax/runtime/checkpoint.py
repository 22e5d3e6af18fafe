"""Saves and restores stages: arrays by orbax, with a JSON record beside them.

checkpoints/permute/         arrays, written by orbax (atomic rename)
checkpoints/permute.json     the stage's record, written last: the stage is done
checkpoints/finetune@1200/   progress inside a stage, at step 1200

A record holds `sha256` of itself and of the arrays' files, and nothing is
restored that does not match it. The last two states of progress are kept, so
that a damaged one costs the steps since the one before.

Arrays that are saved are equal on all processes, local or replicated, or spread
over devices: then each process writes the parts that it has. Process 0 writes
the record. An array is restored as its target is spread, and is local where the
target is; the numbers of processes and devices may differ from the saving run.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from pqf_jax import errors
from pqf_jax.runtime import distributed, files, progress

PyTree = Any
# What orbax writes about the arrays of a save, and the record, at most: 0.1 MB
# for a small network.
OWN_BYTES = 1 << 20
Record = dict[str, Any]


class DamagedError(errors.InputError):
  """A checkpoint that is not what was saved."""


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
      target: the expected tree, of arrays or `jax.ShapeDtypeStruct`s, whose
        shardings over several devices the result has; {}: the stage has a
        record alone.
      compute: () -> (tree, JSON record), called if no checkpoint exists.

    Raises:
      InputError: the checkpoint is damaged, or does not fit the target.
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
      DamagedError: the checkpoint is not what was saved.
      InputError: it does not fit the target.
    """
    if not (self._root / f"{name}.json").exists():
      return None
    record = self._verified_record(name)
    if not jax.tree.leaves(target):
      return target, record
    # Without shardings orbax restores only to the devices of the saving run.
    placed = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
        leaf.shape,
        leaf.dtype,
        sharding=leaf.sharding
        if _is_spread(leaf)
        else distributed.replicated(),
      ),
      target,
    )
    with ocp.StandardCheckpointer() as checkpointer:
      try:
        restored = checkpointer.restore(self._root / name, placed)
      except (ValueError, FileNotFoundError, KeyError) as error:
        raise errors.InputError(
          f"the checkpoint {self._root / name} does not fit this run "
          f"({str(error).partition(chr(10))[0]}); use another --workdir, or "
          "the settings and the version of this program that saved it"
        ) from error
    tree = jax.tree.map(
      lambda leaf, wanted: (
        leaf if _is_spread(wanted) else distributed.unreplicate(leaf)
      ),
      restored,
      target,
    )
    return tree, record

  def save(self, name: str, tree: PyTree, record: Record) -> None:
    """Saves arrays, then the record, without which they are ignored.

    Raises:
      InputError: the disk is full.
    """
    # Checked first: on a full disk tensorstore's threads print tracebacks.
    if distributed.is_lead():
      self._root.mkdir(parents=True, exist_ok=True)
      num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
      files.check_space(self._root, num_bytes + OWN_BYTES)
      # That of a damaged save, which belongs to other arrays.
      (self._root / f"{name}.json").unlink(missing_ok=True)
    if jax.tree.leaves(tree):  # orbax refuses to save none
      self._save_arrays(name, tree)
    elif distributed.is_lead():
      (self._root / name).mkdir(exist_ok=True)
    if distributed.is_lead():
      files.sync_tree(self._root / name)
      record = json.loads(json.dumps(record))  # as it will be read
      sealed = record | {"sha256": self._digest(name, record)}
      record_file = self._root / f"{name}.json"
      files.write(record_file, json.dumps(sealed, indent=2).encode())
    distributed.barrier(f"saved {name}")

  def _save_arrays(self, name: str, tree: PyTree) -> None:
    # With several processes, orbax refuses arrays of a single one.
    if jax.process_count() > 1:
      tree = jax.tree.map(
        lambda leaf: leaf if _is_spread(leaf) else distributed.replicate(leaf),
        tree,
      )
    path = self._root / name
    with files.name_full_disk(path), ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(path, tree, force=True)
      checkpointer.wait_until_finished()

  def save_progress(
    self, stage: str, step: int, tree: PyTree, record: Record
  ) -> None:
    """Saves the state inside a stage; keeps only the one before."""
    others = self._progress(stage)
    self.save(f"{stage}@{step}", tree, record)
    others.pop(step, None)
    others.pop(max((s for s in others if s < step), default=step), None)
    self._remove(others.values())

  def restore_progress(
    self, stage: str, target: PyTree
  ) -> tuple[PyTree, Record] | None:
    """Returns the latest (tree, record) inside a stage, or None.

    A damaged state is named, and the one before is returned.

    Raises:
      DamagedError: all states are damaged.
      InputError: the latest one does not fit the target.
    """
    saved = self._progress(stage)
    for step in sorted(saved, reverse=True):
      try:
        return self.restore(saved[step], target)
      except DamagedError as error:
        if step == min(saved):
          raise
        progress.say(f"going on from the progress before: {error}")
    return None

  def drop_progress(self, stage: str) -> None:
    """Removes the states inside a stage; call it when the stage is saved."""
    self._remove(self._progress(stage).values())

  def stages(self) -> list[str]:
    """Returns the names of all that is saved, of progress with its step."""
    return sorted(path.stem for path in self._root.glob("*.json"))

  def _progress(self, stage: str) -> dict[int, str]:
    """Returns {step: name} of the states inside a stage."""
    saved = {}
    for path in self._root.glob(f"{stage}@*.json"):
      step = path.stem.partition("@")[2]
      if not step.isdecimal():
        raise errors.InputError(
          f"{path} is not a file of this program, which names progress "
          f"{stage}@STEP.json; move it out of {self._root}"
        )
      saved[int(step)] = path.stem
    return saved

  def _digest(self, name: str, record: Record) -> str:
    text = json.dumps(record, sort_keys=True) + files.digest_tree(
      self._root / name
    )
    return hashlib.sha256(text.encode()).hexdigest()

  def _verified_record(self, name: str) -> Record:
    """Returns a record after comparing it and the arrays with its sha256."""
    problems = []
    if distributed.is_lead():
      try:
        record = files.read_json(self._root / f"{name}.json")
        stored = record.pop("sha256", None)
        if stored != self._digest(name, record):
          problems.append(f"its content does not match its sha256 {stored}")
      except (errors.InputError, OSError) as error:
        problems.append(str(error))
    # All processes restore, or none: they wait for each other in restoring.
    for problem in distributed.gather_lists(problems):
      raise DamagedError(
        f"the checkpoint {self._root / name} is damaged ({problem}); put a "
        f"copy back, or move this folder and {name}.json elsewhere to compute "
        "only this again"
      )
    record = files.read_json(self._root / f"{name}.json")
    del record["sha256"]
    return record

  def _remove(self, names: Iterable[str]) -> None:
    for name in names if distributed.is_lead() else ():
      # The record first: without it the arrays are ignored.
      (self._root / f"{name}.json").unlink()
      if (self._root / name).exists():
        (self._root / name).rmtree()


def _is_spread(leaf: Any) -> bool:
  """Returns whether an array, or a shape, is of several devices.

  With several processes, those of one alone do not count.
  """
  place = getattr(leaf, "sharding", None)
  if place is None or len(place.device_set) == 1:
    return False
  return jax.process_count() == 1 or not place.is_fully_addressable

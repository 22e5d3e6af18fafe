"""Tasks: what networks are trained and evaluated for, one folder each.

A task is one object with the members of `contract.Task`. A new one is a folder
with a module-level `TASK`, one line of the registry below (or, from outside of
this package, `register` or an entry point of the group `pqf_jax.tasks`), and a
recipe whose `config.task` names it.
"""

from typing import Any

from pqf_jax import errors, registry
from pqf_jax.tasks.contract import AbstractPrograms as AbstractPrograms
from pqf_jax.tasks.contract import LoadedTask as LoadedTask
from pqf_jax.tasks.contract import Task as Task

_REGISTRY = registry.Registry(
  "task",
  {
    "classification": "pqf_jax.tasks.classification:TASK",
    "detection": "pqf_jax.tasks.detection:TASK",
    "embedding": "pqf_jax.tasks.embedding:TASK",
    "language": "pqf_jax.tasks.language:TASK",
  },
  entry_points="pqf_jax.tasks",
)
MEMBERS = (
  "abstract_programs",
  "check",
  "load",
  "metrics",
  "sample",
)


def register(name: str, task: Task | str) -> None:
  """Adds a task, or the 'package.module:TASK' to import it from.

  Raises:
    InputError: another task has the name.
  """
  _REGISTRY.register(name, task)


def get(name: str) -> Task:
  """Returns the task that `config.task` names.

  Raises:
    InputError: there is none, or it lacks members of `contract.Task`.
  """
  task: Any = _REGISTRY.get(name)
  lacking = [member for member in MEMBERS if not hasattr(task, member)]
  if lacking:
    raise errors.InputError(
      f"task {name!r} lacks {', '.join(lacking)}; see pqf_jax.tasks.contract"
    )
  return task


def names() -> list[str]:
  """Returns the names of all tasks."""
  return _REGISTRY.names()

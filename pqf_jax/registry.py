"""Named things that a config chooses, open to packages outside of this one."""

import difflib
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from pqf_jax import errors


class Registry:
  """Things of one kind by name, each imported when it is asked for.

  A name stands for an object, or for a string 'package.module' or
  'package.module:attribute' that is imported when the name is asked for.
  There are three ways in: the built-in names, `register`, and entry points of
  installed packages.
  """

  def __init__(
    self, kind: str, built_in: Mapping[str, str], *, entry_points: str
  ) -> None:
    """Holds the built-in names.

    Args:
      kind: what error messages call a thing, such as 'data set'.
      built_in: {name: 'package.module'}.
      entry_points: the group of entry points that adds names, such as
        'pqf_jax.datasets'.
    """
    self._kind = kind
    self._group = entry_points
    self._values: dict[str, Any] = dict(built_in)

  def register(self, name: str, value: Any) -> None:
    """Adds a name of an object, or of the string to import it from.

    Adding the same value twice changes nothing.

    Raises:
      InputError: the name stands for another value.
    """
    _add(self._all(), self._kind, name, value)
    self._values[name] = value

  def get(self, name: str) -> Any:
    """Returns the object that a name stands for.

    Raises:
      InputError: nothing has this name; the message lists the names there are.
    """
    values = self._all()
    if name not in values:
      near = difflib.get_close_matches(name, values, 1)
      hint = f"did you mean {near[0]!r}? " if near else ""
      raise errors.InputError(
        f"no {self._kind} is named {name!r}: {hint}there are "
        f"{', '.join(sorted(values))}"
      )
    value = values[name]
    if isinstance(value, str):
      return metadata.EntryPoint(name, value, self._group).load()
    return value

  def names(self) -> list[str]:
    """Returns all names in alphabetical order."""
    return sorted(self._all())

  def _all(self) -> dict[str, Any]:
    """Returns known values and entry points, which take 10 ms to list."""
    values = dict(self._values)
    for point in metadata.entry_points(group=self._group):
      _add(values, self._kind, point.name, point.value)
    return values


def _add(values: dict[str, Any], kind: str, name: str, value: Any) -> None:
  if values.setdefault(name, value) != value:
    raise errors.InputError(
      f"two different {kind}s are named {name!r}, {values[name]!r} and "
      f"{value!r}; rename one"
    )

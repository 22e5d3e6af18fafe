"""The recipes that come with this library: where they are, and their names."""

import ast
import difflib
import pathlib

from pqf_jax import errors

# Modules of `configs` that are no recipes.
_OTHERS = ("__init__", "common")


def folder() -> pathlib.Path:
  """Returns `configs`: inside of an installed package, beside a checkout's."""
  package = pathlib.Path(__file__).parent
  inside = package / "configs"
  return inside if inside.is_dir() else package.parent / "configs"


def names() -> list[str]:
  """Lists the recipes."""
  found = sorted(path.stem for path in folder().glob("*.py"))
  return [name for name in found if name not in _OTHERS]


def summary(name: str) -> str:
  """Returns the first line of a recipe's docstring."""
  text = (folder() / f"{name}.py").read_text()
  return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


def path(recipe: str) -> str:
  """Returns 'FOLDER/NAME.py:VARIANT' of 'NAME:VARIANT', or without variant.

  Raises:
    InputError: there is no such recipe; says which there are.
  """
  name, colon, variant = recipe.partition(":")
  if name not in names():
    near = difflib.get_close_matches(name, names(), 1)
    raise errors.InputError(
      f"no recipe is named {name!r}"
      + (f", did you mean {near[0]!r}?" if near else "")
      + f"; there are {', '.join(names())}"
    )
  return f"{folder() / name}.py{colon}{variant}"

"""What is installed: lists of dependencies that agree, and the recipes."""

import pathlib
import subprocess
import sys
import tomllib

import pytest

from pqf_jax import errors, extras, recipes

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = PROJECT["optional-dependencies"]


def test_requirements_are_the_core_and_the_extra_train():
  lines = (ROOT / "requirements.txt").read_text().splitlines()
  required = {line.partition("#")[0].strip() for line in lines} - {""}
  ours, *train = OPTIONAL["train"]
  assert ours == "pqf_jax[detection,hub,report]"
  for extra in ("detection", "hub", "report"):
    train += OPTIONAL[extra]
  assert required == {*PROJECT["dependencies"], *train}


def test_a_missing_library_is_named_with_its_extra():
  code = """
import sys
sys.modules["absl"] = None
from pqf_jax import __main__
__main__.main()
"""
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2
  assert done.stderr == (
    "error: this needs the module absl, which is not installed: pip install "
    '"pqf_jax[train]"\n'
  )


def test_extras_of_the_table_exist_and_other_modules_are_not_explained():
  assert set(extras.EXTRAS.values()) <= OPTIONAL.keys()
  missing = ModuleNotFoundError("No module named 'own'", name="own.part")
  with pytest.raises(ModuleNotFoundError, match="own"):
    extras.explain(missing)


def test_recipes_are_found_by_name():
  assert recipes.names() == [
    path.stem
    for path in sorted((ROOT / "configs").glob("*.py"))
    if path.stem not in ("__init__", "common")
  ]
  path, _, variant = recipes.path("resnet18:cifar10,large").partition(":")
  assert pathlib.Path(path).is_file() and variant == "cifar10,large"
  assert all(recipes.summary(name).endswith(".") for name in recipes.names())
  with pytest.raises(errors.InputError, match="did you mean 'resnet50'"):
    recipes.path("resnet_50")


def test_the_core_loads_without_the_extras():
  # flax brings the others.
  without = {*extras.EXTRAS} - {"absl", "importlib_resources", "orbax", "rich"}
  code = f"""
import sys
for name in {sorted(without)}:
  sys.modules[name] = None
import pqf_jax
for name in pqf_jax.__all__:
  getattr(pqf_jax, name)
"""
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

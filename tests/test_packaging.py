"""What is installed: lists of dependencies that agree, and the recipes."""

import builtins
import pathlib
import subprocess
import sys
import tomllib

import pytest

from pqf_jax import __main__, errors, extras, recipes

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


def test_a_missing_library_is_named_with_its_extra(monkeypatch, capsys):
  original = builtins.__import__

  def without_absl(name, *args, **kwargs):
    if name.partition(".")[0] == "absl":
      raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return original(name, *args, **kwargs)

  monkeypatch.delitem(sys.modules, "pqf_jax.cli", raising=False)
  monkeypatch.setattr(builtins, "__import__", without_absl)
  with pytest.raises(SystemExit) as ended:
    __main__.main()
  assert ended.value.code == 2
  said = capsys.readouterr().err
  assert (
    'module absl, which is not installed: pip install "pqf_jax[train]"'
    in (said)
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

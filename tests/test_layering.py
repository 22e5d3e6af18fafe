"""The import direction of the design, read from the code itself."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "pqf_jax"
MODULES = sorted(
  path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
  for path in PACKAGE.rglob("*.py")
)

# What a module of ours may import, by the longest prefix that matches. Every
# module may import pqf_jax.errors and pqf_jax.files.
STAGES = ("permute", "quantize", "finetune", "pack")
ALLOWED = {
  "pqf_jax.errors": (),
  "pqf_jax.progress": (),
  "pqf_jax.xla_flags": (),
  "pqf_jax.cluster": (),
  "pqf_jax.ops": ("pqf_jax.ops",),
  "pqf_jax.core.trees": (),
  "pqf_jax.core.blocks": (),
  "pqf_jax.core": ("pqf_jax.core", "pqf_jax.ops"),
  "pqf_jax.data": ("pqf_jax.data",),
  "pqf_jax.data.prepare": ("pqf_jax.data", "pqf_jax.progress"),
  "pqf_jax.models": ("pqf_jax.models", "pqf_jax.core", "pqf_jax.ops"),
  **{f"pqf_jax.{s}": ("pqf_jax.core", "pqf_jax.ops") for s in STAGES},
  "pqf_jax.compression": (
    "pqf_jax.permute",
    "pqf_jax.quantize",
    "pqf_jax.core",
  ),
  "pqf_jax.tasks": (
    "pqf_jax.tasks",
    "pqf_jax.data",
    "pqf_jax.core",
    "pqf_jax.ops",
  ),
  "pqf_jax.checkpoint": ("pqf_jax.core", "pqf_jax.cluster"),
  "pqf_jax.report": ("pqf_jax.report", "pqf_jax.core"),
  "pqf_jax.pipeline": ("pqf_jax",),
  "pqf_jax": (),
}
ONLY_IN = {
  "flax.linen": ("pqf_jax.models",),
  "orbax": ("pqf_jax.checkpoint",),
  "ml_collections": ("pqf_jax.pipeline",),
  "tensorflow_datasets": ("pqf_jax.data",),
  "grain": ("pqf_jax.data",),
}


def _imports(module: str) -> set[str]:
  path = ROOT / (module.replace(".", "/") + ".py")
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{module}: relative import"
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  return found


def _within(name: str, prefixes: tuple[str, ...]) -> bool:
  return any(name == p or name.startswith(f"{p}.") for p in prefixes)


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_go_down(module: str):
  name = module.removesuffix(".__init__")
  layer = max((p for p in ALLOWED if _within(name, (p,))), key=len)
  for imported in _imports(module):
    if _within(imported, ("pqf_jax",)):
      allowed = (*ALLOWED[layer], "pqf_jax.errors", "pqf_jax.files")
      assert _within(imported, allowed), f"{module} imports {imported}"
    for library, homes in ONLY_IN.items():
      if _within(imported, (library,)):
        assert _within(name, homes), f"{module} imports {imported}"


def test_no_module_is_a_drawer():
  drawers = {"utils", "util", "helpers", "helper", "misc", "common"}
  assert not [m for m in MODULES if drawers & set(m.split("."))]


def test_modules_are_small():
  lines = {
    m: len((ROOT / (m.replace(".", "/") + ".py")).read_text().splitlines())
    for m in MODULES
  }
  assert not {m: count for m, count in lines.items() if count > 350}

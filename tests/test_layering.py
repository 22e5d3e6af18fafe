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

# What a module of ours may import, by the longest prefix that matches, besides
# its own room. Every module may import pqf_jax.errors and runtime.files.
ALLOWED = {
  "errors": (),
  "registry": (),
  "runtime": (),
  "numerics": (),
  "nvidia": (),
  "core": ("numerics",),
  "discovery": ("core",),
  "inference": ("core", "discovery.tracing", "nvidia"),
  "permutation": ("core",),
  "kmeans": ("numerics", "nvidia"),
  "permute": ("core", "permutation", "kmeans", "runtime.threads"),
  "quantize": ("core", "kmeans"),
  "calibration": (
    "core",
    "discovery.masks",
    "discovery.small_maps",
    "discovery.tracing",
    "numerics",
    "nvidia",
  ),
  "calibrate": (
    "calibration",
    "core",
    "discovery.masks",
    "discovery.samples",
    "discovery.tracing",
  ),
  "allocation": ("core", "discovery.masks", "discovery.tracing"),
  "budget": ("allocation", "core", "discovery"),
  "rules": ("allocation", "core", "discovery.kernels"),
  "finetune": ("core",),
  "packing": ("core",),
  "pack": ("core", "packing"),
  "exporting": ("core", "extras", "packing"),
  "inspection": ("core", "pack", "packing", "runtime.results"),
  "compression": (
    "budget",
    "calibrate",
    "permute",
    "quantize",
    "core",
    "discovery",
  ),
  "models": ("core", "registry"),
  "data": ("registry",),
  "data.prepare": ("data", "runtime.progress"),
  "tasks": (
    "core",
    "data",
    "discovery.small_maps",
    "finetune",
    "models.contract",
    "models.mask_rcnn",
    "registry",
    "report.drawings",
    "runtime",
  ),
  "report": ("core", "inspection", "runtime.results"),
  "pipeline": ("",),
  "preflight": ("",),
  "recipes": (),
  "extras": (),
  "cli": ("pipeline", "recipes", "runtime"),
  "__main__": ("cli", "extras", "inspection", "report"),
  "pqf_jax": ("",),  # the types of its lazy names
  "": (),
}
ONLY_IN = {
  "flax.linen": ("models",),
  "orbax": ("runtime.checkpoint",),
  "ml_collections": ("cli", "pipeline", "preflight", "tasks"),
  "tensorflow_datasets": ("data",),
  "grain": ("data",),
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
  return any(not p or name == p or name.startswith(f"{p}.") for p in prefixes)


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_go_down(module: str):
  name = module.removesuffix(".__init__").removeprefix("pqf_jax").strip(".")
  name = name or "pqf_jax"
  layer = max((p for p in ALLOWED if _within(name, (p,))), key=len)
  room = name.partition(".")[0]
  allowed = (*ALLOWED[layer], *filter(None, [room]), "errors", "runtime.files")
  for imported in _imports(module):
    if imported.startswith("pqf_jax."):
      ours = imported.removeprefix("pqf_jax.")
      assert _within(ours, allowed), f"{module} imports {imported}"
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
  assert not {m: count for m, count in lines.items() if count > 600}

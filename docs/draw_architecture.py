"""Draws the picture of docs/architecture.md from the imports in the code.

    python docs/draw_architecture.py

writes it into the page; the tests check that it is up to date.
"""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
START, END = "<!-- drawn by docs/draw_architecture.py -->", "<!-- end -->"
# Rooms that every room may use: their arrows would hide the others.
EVERYWHERE = {"errors", "registry", "runtime"}


def room(module: str) -> str:
  """Returns the room of a dotted module of ours: its first part."""
  return module.removeprefix("pqf_jax.").partition(".")[0]


def imports(path: pathlib.Path) -> set[str]:
  """Returns the modules of ours that a file imports."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module:
      names |= {f"{node.module}.{alias.name}" for alias in node.names}
  return {name for name in names if name.startswith("pqf_jax.")}


def edges() -> dict[str, set[str]]:
  """Returns {room: rooms that it imports}."""
  found: dict[str, set[str]] = {}
  for path in sorted((ROOT / "pqf_jax").rglob("*.py")):
    dotted = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    home = room(dotted)
    if home == "__init__":  # the lazy public names
      continue
    used = {room(name) for name in imports(path)}
    found.setdefault(home, set()).update(used - {home} - EVERYWHERE)
  return {home: used for home, used in found.items() if home not in EVERYWHERE}


def reduced(graph: dict[str, set[str]]) -> dict[str, set[str]]:
  """Leaves out every arrow that a path of other arrows implies."""

  def reach(start: str) -> set[str]:
    found: set[str] = set()
    for step in graph[start]:
      found |= {step} | reach(step)
    return found

  return {
    home: {
      used
      for used in direct
      if not any(used in reach(other) for other in direct - {used})
    }
    for home, direct in graph.items()
  }


def mermaid() -> str:
  """Returns the picture in mermaid's language, an arrow for 'imports'."""
  lines = ["```mermaid", "flowchart TD"]
  for home, used in sorted(reduced(edges()).items()):
    lines += [f"  {home} --> {other}" for other in sorted(used)]
  return "\n".join([*lines, "```"])


def page() -> str:
  """Returns the page with today's picture."""
  before, _, rest = PAGE.read_text().partition(START)
  _, _, after = rest.partition(END)
  return f"{before}{START}\n{mermaid()}\n{END}{after}"


if __name__ == "__main__":
  PAGE.write_text(page())

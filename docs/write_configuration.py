"""Writes docs/configuration.md from the recipes and from configs/common.py.

    python docs/write_configuration.py

The tests check that the page is up to date.
"""

import ast
import html
import pathlib
import re
import sys
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "configuration.md"
sys.path.insert(0, str(ROOT))

from configs import common  # noqa: E402
from pqf_jax import recipes  # noqa: E402
from pqf_jax.pipeline import settings  # noqa: E402

INTRODUCTION = """# Settings

Every setting is a flag, `--config.NAME=VALUE`, over what the recipe says. An
unknown one names those whose names are nearest. The defaults below are those of
`configs/common.py`, the paper's; a recipe sets what differs.

This page is written by `docs/write_configuration.py`.
"""
# A comment of this function, a setting with its value, what follows it.
COMMENT = re.compile(r"  # (.*)")
SETTING = re.compile(r"  (?:config|settings)\.([\w.]+) = .*?(?:  # (.*))?")


def blocks(function: str) -> Iterator[tuple[dict[str, str], str]]:
  """Yields settings that stand together in common.py, and their comment.

  Each setting comes with what its own line says.
  """
  source = (ROOT / "configs" / "common.py").read_text()
  (node,) = (
    node
    for node in ast.parse(source).body
    if isinstance(node, ast.FunctionDef) and node.name == function
  )
  found: dict[str, str] = {}
  text: list[str] = []
  for line in [*source.splitlines()[node.lineno : node.end_lineno], ""]:
    comment, setting = COMMENT.fullmatch(line), SETTING.fullmatch(line)
    if found and not setting:
      yield found, " ".join(text)
      found, text = {}, []
    if comment:
      text.append(comment[1])
    elif setting and "ConfigDict()" not in line:
      found[setting[1]] = setting[2] or ""


def table(function: str, prefix: str = "") -> Iterator[str]:
  """Yields the rows of the settings of a function of common.py."""
  defaults = settings.flatten(common.get_config().to_dict())
  yield "| setting, its default | meaning |"
  yield "|---|---|"
  for found, text in blocks(function):
    for name, own in found.items():
      # A comment is about the first of its settings, and about all of them that
      # say nothing themselves.
      first = name == next(iter(found))
      said = text if first else "" if own else "with the setting above"
      meaning = f"{said} ({own})" if said and own else said or own
      meaning = html.escape(meaning, quote=False)
      known = f"{defaults.get(name)} {meaning}"
      choices = settings.CHOICES.get(name, ())
      if name != "mode" and not all(choice in known for choice in choices):
        meaning += f" ({', '.join(choices)})"
      is_value = prefix + name in defaults
      value = f"`{defaults[prefix + name]!r}`" if is_value else "see below"
      yield f"| `{name}`<br>{value} | {meaning} |"


def page() -> str:
  """Returns the page."""
  lines = [INTRODUCTION, "## Recipes", "", "| recipe | what | variants |"]
  lines.append("|---|---|---|")
  for name in recipes.names():
    text = recipes.path(name).removesuffix(":")
    variants = re.search(
      r"^    variant: (.*?)\.\n", pathlib.Path(text).read_text(), re.S | re.M
    )
    words = re.sub(r"\s+", " ", variants[1]) if variants else ""
    lines.append(f"| `{name}` | {recipes.summary(name)} | {words} |")
  lines += ["", "## Modes", "", "| `mode` | what is done |", "|---|---|"]
  lines += [f"| `{mode}` | {text} |" for mode, text in settings.MODES.items()]
  lines += ["", "## All settings", "", *table("get_config")]
  lines += [
    "",
    "## Training",
    "",
    "Both trainings have these: `--config.train.NAME` for stage 0, where",
    "there are no weights to start from, and `--config.finetune.NAME` for",
    "stage 3. The defaults are those of `finetune`; `train.epochs` is 0, and",
    "recipes that train set it.",
    "",
    *table("training", "finetune."),
  ]
  return "\n".join([*lines, ""])


if __name__ == "__main__":
  PAGE.write_text(page())

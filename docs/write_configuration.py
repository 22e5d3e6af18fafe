"""Writes docs/configuration.md from the recipes and from configs/common.py.

    python docs/write_configuration.py

The tests check that the page is up to date.
"""

import ast
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


def blocks(function: str) -> Iterator[tuple[list[str], str]]:
  """Yields the settings that stand together in common.py, and their comment."""
  source = (ROOT / "configs" / "common.py").read_text()
  (node,) = (
    node
    for node in ast.parse(source).body
    if isinstance(node, ast.FunctionDef) and node.name == function
  )
  names: list[str] = []
  text: list[str] = []
  for line in [*source.splitlines()[node.lineno : node.end_lineno], ""]:
    comment, setting = COMMENT.fullmatch(line), SETTING.fullmatch(line)
    if names and not setting:
      yield names, " ".join(text)
      names, text = [], []
    if comment:
      text.append(comment[1])
    elif setting and "ConfigDict()" not in line:
      names.append(setting[1])
      if setting[2]:
        text.append(f"`{setting[1].rpartition('.')[2]}`: {setting[2]}")


def table(function: str, prefix: str = "") -> Iterator[str]:
  """Yields the rows of the settings of a function of common.py."""
  defaults = settings.flatten(common.get_config().to_dict())
  yield "| setting | default | meaning |"
  yield "|---|---|---|"
  for names, text in blocks(function):
    for index, name in enumerate(names):
      choices = settings.CHOICES.get(name, ())
      known = " or ".join(f"`{choice}`" for choice in choices)
      meaning = [text if index == 0 or len(names) == 1 else "as above"]
      if known and name != "mode":
        meaning.append(f"One of {known}.")
      value = defaults.get(prefix + name)
      shown = f"`{value!r}`" if prefix + name in defaults else "see below"
      yield f"| `{name}` | {shown} | {' '.join(meaning)} |"


def page() -> str:
  """Returns the page."""
  lines = [INTRODUCTION, "## Recipes", "", "| recipe | what | variants |"]
  lines.append("|---|---|---|")
  for name in recipes.names():
    text = recipes.path(name).removesuffix(":")
    variants = re.search(r"variant: (.*?)\.\n", pathlib.Path(text).read_text())
    words = variants[1] if variants else ""
    lines.append(f"| `{name}` | {recipes.summary(name)} | {words} |")
  lines += ["", "## Modes", "", "| `mode` | what is done |", "|---|---|"]
  lines += [f"| `{mode}` | {text} |" for mode, text in settings.MODES.items()]
  lines += ["", "## All settings", "", *table("get_config")]
  lines += [
    "",
    "## Training",
    "",
    "Both trainings have these: `--config.train.NAME` for stage 0, where there",
    "are no weights to start from, and `--config.finetune.NAME` for stage 3. The",
    "defaults are those of `finetune`; `train.epochs` is 0, and recipes that train",
    "set it.",
    "",
    *table("training", "finetune."),
  ]
  return "\n".join([*lines, ""])


if __name__ == "__main__":
  PAGE.write_text(page())

"""What the site adds to its Markdown.

Pages whose text lies beside docs/, where people look for it, and names of code
that browsers would break at their hyphens.
"""

import pathlib
import re

from mkdocs.config import defaults
from mkdocs.structure import files as site_files

ROOT = pathlib.Path(__file__).parents[1]
# {file of the repository: page of the site}.
PAGES = {
  "README.md": "index.md",
  "CHANGELOG.md": "changelog.md",
  "SECURITY.md": "security.md",
}

CODE = re.compile(r"(?<!</span>)<code>[^<]*</code>")  # within a sentence
HYPHENATED = re.compile(r"[\w.]*-[\w.-]*\w")


def page(name: str) -> str:
  """Returns a file of the repository with links as the site has them."""

  def moved(link: re.Match[str]) -> str:
    target = link[1].removeprefix("docs/")
    return f"]({PAGES.get(target, target)}"

  text = re.sub(r"\]\(([\w./]+)", moved, (ROOT / name).read_text())
  # The mark by which .ci/run finds the lines; for Markdown it is no language.
  return text.replace("```sh setup", "```sh")


def on_files(
  files: site_files.Files, config: defaults.MkDocsConfig
) -> site_files.Files:
  """Adds the pages; MkDocs calls it."""
  for name, source in PAGES.items():
    files.append(site_files.File.generated(config, source, content=page(name)))
  return files


def on_page_content(content: str, **context: object) -> str:
  """Keeps `--config` and `pqf-jax` on one line; MkDocs calls it."""
  del context
  keep = r'<span class="unbroken">\g<0></span>'
  return CODE.sub(lambda code: HYPHENATED.sub(keep, code[0]), content)

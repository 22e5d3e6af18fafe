"""Writes the page about a packed file, complete in itself as `report.html`."""

import base64
import json
import os
from typing import NamedTuple

import numpy as np

from pqf_jax import inspection
from pqf_jax.report import charts, drawings, html, tables, text
from pqf_jax.runtime import files

# More would be too small to see, and make a large page.
MOST_CODEWORDS = 1024


def write_inspection(
  path: str | os.PathLike[str], found: inspection.Inspection
) -> None:
  """Writes the page about a packed file.

  Args:
    path: of the page.
    found: what `pqf_jax.inspect` found in the file.
  """
  results = found.results or {}
  lines, total = tables.plan_lines(found.variables)
  kernels = {kernel.size.path: kernel for kernel in found.kernels}
  extra = {
    "used": {
      name: f"{kernel.used:,}/{kernel.uses.size:,}"
      for name, kernel in kernels.items()
    },
    "entropy": {
      name: f"{kernel.entropy:.2f}" for name, kernel in kernels.items()
    },
    "distortion": html.percents(found.distortion),
  }
  epsilons = sorted({*found.norm_epsilon.values()})
  about = {
    "norm epsilon": ", ".join(f"{epsilon:g}" for epsilon in epsilons),
    "codebooks": found.storage["codebook"],
    "the rest": found.storage["rest"],
  }
  page = html.render(
    "inspection.html",
    title=os.path.basename(found.path),
    facts=[
      f"format {found.format}",
      *(f"{name} {value}" for name, value in about.items() if value),
    ],
    tiles=_inspection_tiles(found),
    score_charts=charts.score_charts(results) if results else [],
    layer_charts=[
      charts.size_chart(found.variables),
      charts.use_chart(found.kernels),
      charts.distortion_chart(found.distortion),
    ],
    codebooks=list(map(_codebook, found.kernels)),
    columns=tables.COLUMNS,
    lines=lines,
    total=total,
    extra={name: cells for name, cells in extra.items() if cells},
    architecture=json.dumps(found.architecture, indent=2),
    versions=results.get("versions", {}),
    command=results.get("command", ""),
  )
  files.write(path, page.encode())


class _Codebook(NamedTuple):
  """A codebook as the page shows it."""

  path: str
  caption: str
  picture: str


def _codebook(kernel: inspection.Kernel) -> _Codebook:
  """Draws a kernel's codewords, of the first stacked layer, by their use."""
  stacked, num_codes, length = kernel.codebooks.shape
  order = np.argsort(-kernel.uses[0], kind="stable")[:MOST_CODEWORDS]
  block = text.shape((kernel.channels, *kernel.taps))
  caption = f"{num_codes:,} codewords of {length} weights ({block}), "
  caption += f"{np.count_nonzero(kernel.uses[0]):,} used"
  if len(order) < num_codes:
    caption += f"; the {len(order):,} most frequent"
  if stacked > 1:
    caption += f"; the first of {stacked} stacked layers"
  words = kernel.codebooks[0, order].astype(np.float64)
  picture = drawings.draw_codewords(words, kernel.taps)
  return _Codebook(
    kernel.size.path, caption, base64.b64encode(picture).decode()
  )


def _inspection_tiles(
  found: inspection.Inspection,
) -> list[tuple[str, str, str]]:
  before = text.size(found.dense_bytes)
  ratio = found.dense_bytes / found.file_bytes
  weights = max(1, found.dense_bytes // 4)
  used = sum(kernel.used for kernel in found.kernels)
  codewords = sum(kernel.uses.size for kernel in found.kernels)
  tiles = [
    ("Smaller", f"{ratio:.1f}×", "than in float32"),
    ("File", text.size(found.file_bytes), f"was {before}"),
    ("Bits", f"{8 * found.payload_bytes / weights:.2f}", "a weight"),
  ]
  if codewords:
    share = text.percent(used / codewords)
    tiles.append(("Codewords used", share, f"{used:,} of {codewords:,}"))
  return tiles + (html.score_tiles(found.results) if found.results else [])

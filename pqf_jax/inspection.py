"""What is in a packed file: layers, bits, codebooks and the use of their codes.

Where the file lies in the workdir of the run that wrote it, also what that run
measured: accuracy, distortion, versions and command.
"""

import json
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pqf_jax import pack
from pqf_jax.core import plan as plans
from pqf_jax.packing import bits, header, layers
from pqf_jax.runtime import files, results

# Columns of the table that `str` makes, and of the page.
USE = ("used", "entropy")


class Kernel(NamedTuple):
  """A compressed kernel.

  Attributes:
    size: its path, dense shape, D, K, N and bytes.
    channels: input channels that share a sub-vector.
    taps: sizes of its taps, such as (3, 3).
    codebooks: [S, K, D], where S layers are stacked; S is 1 for others.
    uses: int64 [S, K], how many sub-vectors have each codeword.
  """

  size: plans.LayerSize
  channels: int
  taps: tuple[int, ...]
  codebooks: np.ndarray
  uses: np.ndarray

  @property
  def used(self) -> int:
    """Returns how many of its S * K codewords a sub-vector has."""
    return int(np.count_nonzero(self.uses))

  @property
  def entropy(self) -> float:
    """Returns the entropy of a code in bits, at most log2(K).

    It is the mean of the stacked layers, each of which has its own codebook.
    """
    shares = self.uses / self.uses.sum(1, keepdims=True)
    logs = np.log2(shares, where=shares > 0, out=np.zeros_like(shares))
    return float(-(shares * logs).sum(1).mean() + 0.0)  # no -0.0


class Inspection(NamedTuple):
  """What `inspect` found; its `str` is a table for a terminal.

  Attributes:
    path: of the file.
    format: number of the file's layout.
    file_bytes: of the whole file.
    architecture: what it was packed with, JSON data.
    storage: {'codebook' or 'rest': names of the types that are stored}.
    norm_epsilon: {folded norm: its epsilon}.
    variables: the sizes of all that is stored, by path; together they are the
      payload.
    kernels: the compressed ones.
    results: content of the results.json beside the file, see
      `report.schema.Results`; None where there is none of this very file.
  """

  path: str
  format: int
  file_bytes: int
  architecture: Any
  storage: dict[str, str]
  norm_epsilon: dict[str, float]
  variables: tuple[plans.LayerSize, ...]
  kernels: tuple[Kernel, ...]
  results: dict[str, Any] | None

  @property
  def payload_bytes(self) -> int:
    """Returns the bytes of all variables; the file adds its header."""
    return sum(size.payload_bytes for size in self.variables)

  @property
  def dense_bytes(self) -> int:
    """Returns the bytes of all variables in float32."""
    return 4 * sum(math.prod(size.shape) for size in self.variables)

  @property
  def distortion(self) -> dict[str, float]:
    """Returns {path: error / variance} before fine-tuning, where known."""
    return dict((self.results or {}).get("distortion", {}))

  def __str__(self) -> str:
    """Returns the table, and above and below it what is true of the file."""
    ratio = self.dense_bytes / self.file_bytes
    about = {
      "file": f"{self.path}, {self.file_bytes:,} bytes, {ratio:.1f}x smaller "
      f"than float32 ({self.dense_bytes:,})",
      "format": f"{self.format}",
      "codebooks": self.storage["codebook"],
      "the rest": self.storage["rest"],
      "norm epsilon": ", ".join(
        f"{epsilon:g}" for epsilon in sorted({*self.norm_epsilon.values()})
      ),
      "architecture": json.dumps(self.architecture),
    }
    parts = [_list(about), _align(self._rows())]
    if self.results:
      parts.append(_list(_told(self.results)))
    return "\n\n".join(parts)

  def _rows(self) -> list[Sequence[str]]:
    distortion = self.distortion
    names = ("kernel", "shape", "block", "K", "bits/w", "bytes", *USE)
    rows: list[Sequence[str]] = [
      (*names, "distortion") if distortion else names
    ]
    for kernel in self.kernels:
      size = kernel.size
      path = size.path.removeprefix("params/").removesuffix("/kernel")
      blocks = (size.shape, (kernel.channels, *kernel.taps))
      row = (
        path,
        *("x".join(map(str, sizes)) for sizes in blocks),
        f"{size.num_codes}",
        *_sums([size]),
        f"{kernel.used}/{kernel.uses.size}",
        f"{kernel.entropy:.2f}",
      )
      error = distortion.get(size.path)
      last = "" if error is None else f"{100 * error:.2f} %"
      rows.append((*row, last) if distortion else row)
    rest = [size for size in self.variables if not size.num_codes]
    for name, sizes in (
      (f"{len(rest)} dense", rest),
      ("total", self.variables),
    ):
      row = (name, "", "", "", *_sums(sizes))
      rows.append((*row, *[""] * (len(rows[0]) - len(row))))
    return rows


def inspect(path: str | os.PathLike[str]) -> Inspection:
  """Reads a packed file, checks all of it, and counts the use of its codes.

  Raises:
    InputError: the file is missing, damaged, of another format, or not packed
      by this library.
  """
  packed, contents = pack.read_contents(path)
  kernels = tuple(
    _kernel(path, *parts) for path, parts in contents.layers.items()
  )
  arrays = [scaled.numbers for scaled in contents.dense.values()]
  arrays += [scaled.numbers for _, scaled in contents.norms.values()]
  stored = {
    "codebook": {layer.codebook for layer, _, _ in contents.layers.values()},
    "rest": {array.dtype.name for array in arrays},
  }
  sizes = [kernel.size for kernel in kernels]
  return Inspection(
    os.fspath(path),
    packed.header["format"],
    int(files.absolute(path).stat().length),
    packed.header["architecture"],
    {part: ", ".join(sorted(names)) for part, names in stored.items()},
    {norm: epsilon for norm, (epsilon, _) in contents.norms.items()},
    tuple(sorted([*sizes, *_dense_sizes(contents)])),
    kernels,
    results.beside(path),
  )


def _kernel(
  path: str, layer: layers.Layer, codes: np.ndarray, codebook: np.ndarray
) -> Kernel:
  node = layers.unpack(layer, codes, codebook)
  codebooks = layer.apart(np.asarray(node.codebook))
  num_codes, length = codebooks.shape[1:]
  indices = layer.apart(np.asarray(node.codes))
  return Kernel(
    plans.LayerSize(
      path,
      node.shape,
      length,
      num_codes,
      indices.size,
      codes.nbytes + codebook.nbytes,
    ),
    layer.spec.channels,
    layer.spec.tap_shape(layer.shape),
    codebooks,
    np.stack([bits.count_codes(part, num_codes) for part in indices]),
  )


def _dense_sizes(contents: header.Contents) -> Iterable[plans.LayerSize]:
  """Yields the sizes of what stays dense, scale and bias of a norm apart."""
  arrays = {path: scaled.numbers for path, scaled in contents.dense.items()}
  for norm, (_, scaled) in contents.norms.items():
    # Packing has folded mean and variance into these two.
    paths = (name.format(norm) for name in plans.NORM[:2])
    arrays |= dict(zip(paths, scaled.numbers, strict=True))
  for path, array in arrays.items():
    yield plans.LayerSize(path, array.shape, 0, 0, 0, array.nbytes)


def _sums(sizes: Sequence[plans.LayerSize]) -> tuple[str, str]:
  """Returns the bits of each weight, and the bytes, of some variables."""
  num_bytes = sum(size.payload_bytes for size in sizes)
  weights = sum(math.prod(size.shape) for size in sizes)
  return f"{8 * num_bytes / max(1, weights):.2f}", f"{num_bytes:,}"


def _told(told: dict[str, Any]) -> dict[str, str]:
  """Returns what a run tells of its file; a missing field is left out."""
  scores = {
    label: ", ".join(
      f"{title} {100 * value:.2f} %"
      for stage, title in results.STAGES.items()
      if (value := told.get(f"{metric}_{stage}")) is not None
    )
    for metric, label in told.get("metrics", {}).items()
  }
  versions = told.get("versions", {})
  return scores | {
    "versions": ", ".join(f"{name} {text}" for name, text in versions.items()),
    **{name: told.get(name, "") for name in ("date", "device", "command")},
  }


def _list(facts: dict[str, str]) -> str:
  """Returns a line for each fact that is there."""
  return "\n".join(
    f"{_printable(name)}: {_printable(fact)}"
    for name, fact in facts.items()
    if fact
  )


def _align(rows: Sequence[Sequence[str]]) -> str:
  """Returns a table whose first column is on the left, others on the right."""
  cells = [[_printable(cell) for cell in row] for row in rows]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  lines = []
  for first, *others in cells:
    right = (f"{x:>{n}}" for x, n in zip(others, widths[1:], strict=True))
    lines.append("  ".join([f"{first:<{widths[0]}}", *right]).rstrip())
  return "\n".join(lines)


def _printable(text: str) -> str:
  """Returns a text that leaves a terminal as it is, whatever names hold."""
  return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)

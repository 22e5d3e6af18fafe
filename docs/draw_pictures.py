"""Draws the pictures of the README and of the docs.

    python docs/draw_pictures.py

writes docs/pictures/*.svg; the tests check that they are up to date. Each one
has a light and a dark form, and its own background, so that it can be read on
any page. What they show is computed by this library, or was measured.
"""

import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Iterable, Sequence
from xml.sax import saxutils

import jax
import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "pictures"
sys.path.insert(0, str(ROOT))

import pqf_jax  # noqa: E402

# (light, dark): colours that people tell apart whatever their sight.
COLOURS = {
  "page": ("#fcfcfb", "#1a1a19"),
  "ink": ("#1f1e1c", "#f2f1ee"),
  "faint": ("#8a8984", "#8f8e88"),
  "a": ("#2a78d6", "#5a9cea"),
  "b": ("#e0662a", "#f08a54"),
  "c": ("#178a5f", "#3fb488"),
  "d": ("#8a55c4", "#b48be0"),
}


@dataclasses.dataclass(frozen=True)
class Toy:
  """A layer of 8 input channels, of which any two that are alike lie apart.

  Attributes:
    kernel: [8, outputs], trained order.
    permutation: [8]; new channel i is old channel `permutation[i]`.
    codes: [4, outputs] of the permuted kernel.
    codebook: [K, 2].
    lost: squared error over energy, in the trained and the new order.
  """

  kernel: np.ndarray
  permutation: np.ndarray
  codes: np.ndarray
  codebook: np.ndarray
  lost: tuple[float, float]

  @property
  def permuted(self) -> np.ndarray:
    """Returns the kernel in the new order."""
    return self.kernel[self.permutation]

  @property
  def decoded(self) -> np.ndarray:
    """Returns the kernel that codes and codebook stand for."""
    pairs = self.codebook[self.codes]  # [4, outputs, 2]
    return pairs.transpose(0, 2, 1).reshape(self.kernel.shape)


@functools.cache
def toy(outputs: int, num_codes: int) -> Toy:
  """Permutes and quantizes a kernel in which channels i and i + 4 are alike."""
  rng = np.random.default_rng(3)
  features = rng.normal(size=(4, outputs))
  kernel = np.concatenate([features, features])
  kernel = (kernel + 0.25 * rng.normal(size=kernel.shape)).astype(np.float32)
  variables = {
    "params": {
      "first": {"kernel": jnp.ones((4, 8))},
      "second": {"kernel": jnp.asarray(kernel)},
    }
  }
  rules = [
    pqf_jax.Rule("params/first/kernel", None),
    pqf_jax.Rule("params/second/kernel", num_codes, channels=2),
  ]
  hidden = pqf_jax.ChannelAxis("hidden")
  axes = {
    "params/first/kernel": (None, hidden),
    "params/second/kernel": (hidden, None),
  }
  _, permutations, _ = pqf_jax.permute_channels(
    jax.random.key(0), variables, axes, pqf_jax.make_plan(rules, variables)
  )
  permutation = permutations["hidden"]
  before, after = (
    _quantize(kernel[order], num_codes) for order in (np.arange(8), permutation)
  )
  energy = float(np.mean(kernel**2))
  lost = tuple(
    float(result.distortion[-1]) / 2 / energy for result in (before, after)
  )
  codes = np.asarray(after.codes).reshape(4, outputs)
  return Toy(kernel, permutation, codes, np.asarray(after.codebook), lost)


def _quantize(kernel: np.ndarray, num_codes: int) -> pqf_jax.KMeansResult:
  """K-means of [channels, outputs], two channels a sub-vector."""
  vectors = kernel.reshape(4, 2, -1).transpose(0, 2, 1).reshape(-1, 2)
  return pqf_jax.annealed_kmeans(
    jax.random.key(0), jnp.asarray(vectors), num_codes=num_codes, num_steps=100
  )


def svg(width: int, height: int, about: str, parts: Iterable[str]) -> str:
  """Returns a picture in both forms, with a text for those who cannot see."""
  light, dark = (
    "".join(
      f".{name}{{fill:{pair[form]}}}.line-{name}{{stroke:{pair[form]}}}"
      for name, pair in COLOURS.items()
    )
    for form in (0, 1)
  )
  return "\n".join(
    [
      f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
      f'width="{width}" height="{height}" role="img">',
      f"<title>{saxutils.escape(about)}</title>",
      "<style>text{font:14px system-ui,sans-serif}.small{font-size:12px}"
      f".middle{{text-anchor:middle}}line,ellipse{{fill:none}}{light}"
      f"@media (prefers-color-scheme:dark){{{dark}}}</style>",
      f'<rect class="page" width="{width}" height="{height}" rx="8"/>',
      *parts,
      "</svg>\n",
    ]
  )


def words(x: float, y: float, line: str, names: str = "ink") -> str:
  """Returns a line of text that begins at x, or has its middle there."""
  return (
    f'<text class="{names}" x="{x:.0f}" y="{y:.0f}">'
    f"{saxutils.escape(line)}</text>"
  )


def cells(x: float, y: float, weights: np.ndarray, size: float) -> list[str]:
  """Draws weights [rows, columns]: the hue is the sign, the depth the size."""
  drawn = []
  for (row, column), weight in np.ndenumerate(weights):
    depth = min(1.0, abs(float(weight)) / 2)
    drawn.append(
      f'<rect class="{"a" if weight > 0 else "b"}" x="{x + column * size:.0f}" '
      f'y="{y + row * size:.0f}" width="{size - 1:.0f}" '
      f'height="{size - 1:.0f}" fill-opacity="{depth:.2f}"/>'
    )
  return drawn


def frame(x: float, y: float, width: float, height: float) -> str:
  """Draws the outline of a sub-vector."""
  return (
    f'<rect class="line-ink" x="{x - 1.5:.1f}" y="{y - 1.5:.1f}" '
    f'width="{width + 2:.0f}" height="{height + 2:.0f}" fill="none"/>'
  )


def idea() -> str:
  """Draws the four steps on the toy layer: the picture of the README."""
  layer, size, top = toy(10, 8), 16, 56
  columns = [24, 232, 440, 728]
  titles = ("trained kernel", "permute", "quantize", "fine-tune and pack")
  notes = (
    "8 channels x 10 outputs",
    "like beside like: same outputs",
    "a code for each pair of weights",
    "as decoded; codebooks learn",
  )
  parts = []
  for x, title, note in zip(columns, titles, notes, strict=True):
    parts += [words(x, 28, title), words(x, 46, note, "faint small")]
  parts += cells(columns[0], top, layer.kernel, size)
  parts += cells(columns[1], top, layer.permuted, size)
  parts += [
    frame(columns[1], top + 2 * size * pair, 10 * size, 2 * size)
    for pair in range(4)
  ]
  for (row, column), code in np.ndenumerate(layer.codes):
    parts.append(
      words(
        columns[2] + (column + 0.5) * size,
        top + (2 * row + 1.3) * size,
        f"{code}",
        "ink small middle",
      )
    )
  x = columns[2] + 10 * size + 16
  parts += cells(x, top, layer.codebook.T[:, :4], size)
  parts += cells(x, top + 3 * size, layer.codebook.T[:, 4:], size)
  parts.append(words(x, top + 6.3 * size, "codebook", "faint small"))
  parts += cells(columns[3], top, layer.decoded, size)
  for x in (columns[0], columns[1], columns[2] + 80):
    parts.append(words(x + 10 * size + 16, top + 68, "\u2192", "faint"))
  old, new = (f"{100 * lost:.0f} %" for lost in layer.lost)
  bottom = top + 8 * size + 22
  parts += [
    words(columns[0], bottom, "32 bits a weight", "ink small"),
    words(
      columns[1], bottom, f"k-means will lose {new}, not {old}", "ink small"
    ),
    words(columns[2], bottom, "3 bits a pair, and 8 codewords", "ink small"),
    words(columns[3], bottom, "one small file", "ink small"),
  ]
  about = (
    "A kernel is permuted so that similar channels are neighbours, and "
    "quantized to a small codebook and codes, which is trained and packed."
  )
  return svg(912, 230, about, parts)


def same_function() -> str:
  """Draws two layers before and after their channels have changed places."""
  order, names = [2, 0, 3, 1], "abcd"
  parts: list[str] = []
  titles = ("as trained", "permuted")
  for left, rows, title in zip(
    (30, 400), ([0, 1, 2, 3], order), titles, strict=True
  ):
    parts.append(words(left, 28, title))
    middle = left + 140
    ends = {
      **{(left, y): "first" for y in (80, 130, 180)},
      **{(left + 280, y): "second" for y in (105, 155)},
    }
    for row, channel in enumerate(rows):
      y, name = 60 + 47 * row, names[channel]
      parts += [
        f'<line class="line-{name}" x1="{middle}" y1="{y}" x2="{x}" y2="{end}" '
        'stroke-width="2"/>'
        for x, end in ends
      ]
      parts += [
        f'<circle class="{name}" cx="{middle}" cy="{y}" r="11"/>',
        words(middle, y + 4, f"{channel + 1}", "page small middle"),
      ]
    parts += [
      f'<circle class="faint" cx="{x}" cy="{y}" r="8"/>' for x, y in ends
    ]
    for x, name in ((left + 20, "first kernel"), (left + 176, "second kernel")):
      parts.append(words(x, 240, name, "faint small"))
  about = (
    "Four channels between two layers change places. Each keeps its lines to "
    "both layers, so the outputs stay the same."
  )
  return svg(720, 258, about, parts)


def clouds() -> str:
  """Draws the sub-vectors as points, before and after the permutation."""
  layer = toy(96, 16)
  parts: list[str] = []
  for index, (left, kernel) in enumerate(
    zip((20, 380), (layer.kernel, layer.permuted), strict=True)
  ):
    pairs = kernel.reshape(4, 2, -1).transpose(0, 2, 1).reshape(-1, 2)
    codebook = np.asarray(_quantize(kernel, 16).codebook)
    parts.append(words(left, 28, ("as trained", "permuted")[index]))
    parts += _cloud(left + 160, 186, pairs, codebook)
    covariance = np.cov(pairs.T)
    parts += [
      words(
        left,
        352,
        f"determinant of the covariance {np.linalg.det(covariance):.2f}",
        "ink small",
      ),
      words(
        left,
        370,
        f"16 codewords lose {100 * layer.lost[index]:.1f} % of the energy",
        "ink small",
      ),
    ]
  about = (
    "Pairs of weights as points. As trained they fill a disc; permuted they "
    "lie along a line, and the same number of codewords lies closer to them."
  )
  return svg(720, 386, about, parts)


def _cloud(
  x: float, y: float, pairs: np.ndarray, codebook: np.ndarray
) -> list[str]:
  """Draws points [N, 2], their ellipse of two deviations, and codewords."""
  scale = 38
  values, vectors = np.linalg.eigh(np.cov(pairs.T))
  long, short = 2 * scale * np.sqrt(values[::-1])
  # The axis up is negative in a picture. Axes have no sign, so neither angle.
  angle = -np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1])) % 180
  axes = [
    f'<line class="line-faint" x1="{x - 150}" y1="{y}" x2="{x + 150}" y2="{y}" '
    'stroke-opacity=".5"/>',
    f'<line class="line-faint" x1="{x}" y1="{y - 135}" x2="{x}" y2="{y + 135}" '
    'stroke-opacity=".5"/>',
    words(x + 96, y + 16, "channel 2i", "faint small"),
    words(x + 6, y - 132, "channel 2i + 1", "faint small"),
  ]
  points = [
    f'<circle class="a" cx="{x + scale * p:.1f}" cy="{y - scale * q:.1f}" '
    'r="2.2" fill-opacity=".45"/>'
    for p, q in pairs
  ]
  ellipse = (
    f'<ellipse class="line-faint" cx="{x}" cy="{y}" rx="{long:.1f}" '
    f'ry="{short:.1f}" transform="rotate({angle:.1f} {x} {y})" '
    'stroke-width="1.5"/>'
  )
  centres = [
    f'<circle class="b line-page" cx="{x + scale * p:.1f}" '
    f'cy="{y - scale * q:.1f}" r="5" stroke-width="1.5"/>'
    for p, q in codebook
  ]
  return [*axes, *points, ellipse, *centres]


def accuracy() -> str:
  """Draws accuracy against bytes, as `docs/cifar10.json` has both."""
  measured = json.loads((ROOT / "docs" / "cifar10.json").read_text())
  least, most = 88.8, 91.2

  def x(size: float) -> float:
    return 70 + 430 * np.log2(size / 3e5) / np.log2(1.6e6 / 3e5)

  def y(top1: float) -> float:
    return 310 - 260 * (top1 - least) / (most - least)

  parts = [words(20, 28, "CIFAR-10 top-1, ResNet-18 of 44.7 MB (%)")]
  for level in np.arange(89, 91.1, 0.5):
    parts += [
      f'<line class="line-faint" x1="70" x2="500" y1="{y(level):.1f}" '
      f'y2="{y(level):.1f}" stroke-opacity=".25"/>',
      words(30, y(level) + 4, f"{level:.1f}", "faint small"),
    ]
  for kilobytes in (400, 800, 1200):
    parts.append(
      words(x(1000 * kilobytes), 330, f"{kilobytes} kB", "faint small middle")
    )
  level = y(measured["dense"])
  parts += [
    f'<line class="line-ink" x1="70" x2="500" y1="{level:.1f}" '
    f'y2="{level:.1f}" stroke-dasharray="4 4"/>',
    words(512, level + 4, f"dense, {measured['dense']}", "ink small"),
  ]
  for colour, series in zip("abcd", measured["series"], strict=True):
    means = [
      (x(point["bytes"]), y(float(np.mean(point["top1"]))))
      for point in series["points"]
    ]
    path = " ".join(f"{left:.1f},{top:.1f}" for left, top in means)
    parts.append(
      f'<polyline class="line-{colour}" points="{path}" fill="none" '
      'stroke-width="2"/>'
    )
    parts += [
      f'<circle class="{colour}" cx="{left:.1f}" cy="{top:.1f}" r="4.5"/>'
      for left, top in means
    ]
  for row, (colour, series) in enumerate(
    zip("abcd", measured["series"], strict=True)
  ):
    top = 200 + 22 * row
    parts += [
      f'<circle class="{colour}" cx="518" cy="{top - 4}" r="4.5"/>',
      words(530, top, series["name"], "ink small"),
    ]
  about = (
    "Accuracy against bytes of four ways to compress a ResNet-18: the recipe "
    "best lies above the paper's, and calibration alone beside it."
  )
  return svg(720, 348, about, parts)


PICTURES = {
  "idea": idea,
  "same_function": same_function,
  "clouds": clouds,
  "accuracy": accuracy,
}


def main(names: Sequence[str] = tuple(PICTURES)) -> None:
  """Writes pictures."""
  FOLDER.mkdir(exist_ok=True)
  for name in names:
    (FOLDER / f"{name}.svg").write_text(PICTURES[name]())


if __name__ == "__main__":
  main()

"""Formats figures, the same on the terminal and on the page."""

import math
from collections.abc import Sequence

UNITS = ("B", "KiB", "MiB", "GiB")


def size(num_bytes: float) -> str:
  """Returns bytes in the largest unit that gives 1 or more: `1.54 MiB`."""
  power = 0
  while abs(num_bytes) >= 1024 and power < len(UNITS) - 1:
    num_bytes /= 1024
    power += 1
  digits = 0 if power == 0 else max(0, 2 - int(math.log10(abs(num_bytes))))
  return f"{num_bytes:.{digits}f} {UNITS[power]}"


def round_size(num_bytes: int) -> str:
  """Returns bytes that are few of a unit without decimals: `32 KiB`."""
  power = min((num_bytes.bit_length() - 1) // 10, len(UNITS) - 1)
  return f"{num_bytes / 1024**power:g} {UNITS[power]}"


def percent(fraction: float) -> str:
  """Returns a fraction in percent: `69.76 %`."""
  return f"{100 * fraction:.2f} %"


def points(gap: float) -> str:
  """Returns a difference of fractions in percentage points: `-3.02`."""
  # Adding 0.0 turns -0.0, which rounding may give, into 0.0.
  return f"{round(100 * gap, 2) + 0.0:+.2f}"


def duration(seconds: float) -> str:
  """Returns a time as `12.3 s`, `4 min 19 s` or `1 h 02 min`."""
  if seconds < 59.95:
    return f"{seconds:.1f} s"
  minutes, rest = divmod(round(seconds), 60)
  if minutes < 60:
    return f"{minutes} min {rest:02d} s"
  return f"{minutes // 60} h {minutes % 60:02d} min"


def shape(sizes: Sequence[int]) -> str:
  """Returns the sizes of the axes: `3x3x512x512`."""
  return "x".join(map(str, sizes))


def short_path(path: str) -> str:
  """Returns a path without params/ and /kernel: `layer1/0/conv1`."""
  return path.removeprefix("params/").removesuffix("/kernel")


def reader(consumers: Sequence[str], group: str) -> str:
  """Returns the first kernel that reads a group, with its layer of a stack."""
  _, layer, number = group.rpartition(", layer ")
  return short_path(consumers[0]) + (layer + number if layer else "")


def capitalize(label: str) -> str:
  """Returns a label as the start of a sentence: `Top-1`."""
  return label[:1].upper() + label[1:]

"""Draws the table of a preflight: a column a program, figures of one chip."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import rich.box
import rich.table

from pqf_jax.preflight import costs, gpu_compiler, hardware


class Entry(NamedTuple):
  """A program and its cost.

  Attributes:
    name: what it does.
    batch_size: images over all chips, or 0.
    detail: its input, where that is no batch.
    dtype: type of the inputs of its products.
    hbm_bytes: memory that each chip needs; 0 where the compiler states none.
    cost: None where the compiler refused the program for its memory.
  """

  name: str
  batch_size: int
  detail: str
  dtype: str
  hbm_bytes: float
  cost: costs.Cost | None


def render(
  target: hardware.Target,
  entries: Sequence[Entry],
  trained_bytes: int,
) -> rich.table.Table:
  """Draws the table.

  Args:
    target: the hardware compiled for.
    entries: one a column.
    trained_bytes: size of the trainable weights.
  """
  table = rich.table.Table(
    title=f"Preflight: {target.topology}, {target.num_chips} chips",
    caption=(
      f"figures are those of one chip; {size(trained_bytes)} of weights are "
      "trained"
    ),
    box=rich.box.SIMPLE,
  )
  table.add_column("")
  for entry in entries:
    table.add_column(entry.name, justify="right")
  columns = [_column(target, entry) for entry in entries]
  for label in columns[0]:
    table.add_row(label, *(column[label] for column in columns))
  return table


def notes(target: hardware.Target, devices: hardware.Devices) -> Iterator[str]:
  """Lists what the figures leave out."""
  if devices.is_estimate:
    yield (
      f"{target.topology}: compiled by XLA's CPU compiler for as many host "
      "devices. Memory is an estimate, and so are traffic and collectives: a "
      "GPU fuses both further. The GPU's own compiler, which needs no GPU: "
      f"{gpu_compiler.installation()}"
    )
  elif devices.counting is not devices.sizing:
    yield (
      f"{target.topology}: FLOPs and traffic are an estimate by XLA's CPU "
      "compiler, and a GPU fuses further; memory and collectives are by the "
      "GPU's own. K-means is compiled without its kernels for GPUs."
    )
  yield (
    "time: the largest of the three, at peak rates; no real step is as fast. "
    "Collectives also wait for each other, about 1 us each and hop. k-means "
    "is element-wise, which matrix units do not do: its FLOPs take longer."
  )


def size(num_bytes: float) -> str:
  """Formats bytes with three digits, in powers of 1000."""
  value, unit = num_bytes, "B"
  for larger in ("kB", "MB", "GB", "TB"):
    if value < 999.5:
      break
    value, unit = value / 1000, larger
  return f"{value:.3g} {unit}"


def _column(target: hardware.Target, entry: Entry) -> dict[str, str]:
  limit, cost = target.chip.hbm_bytes, entry.cost
  share = f"{100 * entry.hbm_bytes / limit:.1f} %" if entry.hbm_bytes else "?"
  batch = f"{entry.batch_size} ({entry.batch_size // target.num_chips} a chip)"
  rows = {
    "input": batch if entry.batch_size else entry.detail,
    "HBM needed": size(entry.hbm_bytes) if entry.hbm_bytes else "too much",
    f"of {size(limit)}": share,
  }
  if cost is None:
    labels = ("FLOPs", "HBM traffic", *_COLLECTIVE_ROWS, *_TIME_ROWS)
    return rows | dict.fromkeys(labels, "does not fit")
  line = costs.roofline(cost, target, dtype=entry.dtype)
  return (
    rows
    | {"FLOPs": f"{cost.flops:.3g}", "HBM traffic": size(cost.moved_bytes)}
    | dict(zip(_COLLECTIVE_ROWS, _exchanges(cost), strict=True))
    | dict(zip(_TIME_ROWS, _times(line, entry.batch_size), strict=True))
  )


_COLLECTIVE_ROWS = ("collectives", "the largest", "all others", "sent")
_TIME_ROWS = (
  "time for FLOPs",
  "time for HBM",
  "time for links",
  "roofline time",
  "images/s, all chips",
)


def _exchanges(cost: costs.Cost) -> tuple[str, ...]:
  kinds = Counter(collective.kind for collective in cost.collectives)
  if not kinds:
    return "none", "", "", ""
  sizes = sorted(c.num_bytes for c in cost.collectives)
  return (
    ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
    size(sizes[-1]),
    size(sum(sizes[:-1])),
    size(cost.sent_bytes),
  )


def _times(line: costs.Roofline, batch_size: int) -> tuple[str, ...]:
  bounds = tuple(f"{1e3 * seconds:.3g} ms" for seconds in line)
  speed = f"{batch_size / line.seconds:.3g}" if batch_size else ""
  return *bounds, f"{1e3 * line.seconds:.3g} ms ({line.bound})", speed

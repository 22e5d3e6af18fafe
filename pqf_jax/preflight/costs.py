"""Reads memory, FLOPs, traffic and collectives off a compiled program."""

import math
import re
from typing import Any, NamedTuple

from pqf_jax.preflight import hardware

KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)
_INSTRUCTION = re.compile(
  r"\s*(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<shapes>.*?) "
  rf"(?P<kind>{'|'.join(KINDS)})(?P<half>-start|-done)?\("
)
# The operand of a second half, whether or not its shape stands before it.
_OPERAND = re.compile(r"-done\(.*?%?([\w.-]+)\)(?:,|$)")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")


class Collective(NamedTuple):
  """One exchange between chips.

  Attributes:
    kind: one of `KINDS`.
    num_bytes: size of its result on one chip.
    group_size: number of chips that exchange with each other.
  """

  kind: str
  num_bytes: int
  group_size: int

  @property
  def sent_bytes(self) -> float:
    """The least that a chip sends, in a ring (Patarasuk and Yuan, 2009)."""
    size, others = self.num_bytes, self.group_size - 1
    return {
      "all-reduce": 2 * size * others / self.group_size,
      "all-gather": size * others / self.group_size,
      "reduce-scatter": size * others,  # the result is one share
      "all-to-all": size * others / self.group_size,
      "collective-permute": size,
    }[self.kind]


class Cost(NamedTuple):
  """The cost of one run of a program for each chip.

  Attributes:
    hbm_bytes: arguments, results, temporaries and code, at once.
    flops: floating-point operations; NaN where the compiler does not count.
    moved_bytes: read from and written to HBM; NaN likewise.
    collectives: all of them.
  """

  hbm_bytes: float
  flops: float
  moved_bytes: float
  collectives: tuple[Collective, ...]

  @property
  def sent_bytes(self) -> float:
    """The bytes that the chip sends to others."""
    return sum(collective.sent_bytes for collective in self.collectives)


class Roofline(NamedTuple):
  """Lower bounds of a program's time, in seconds.

  Attributes:
    flops: time of the arithmetic alone.
    hbm: time of reading and writing memory alone.
    links: time of sending alone.
  """

  flops: float
  hbm: float
  links: float

  @property
  def seconds(self) -> float:
    """The largest bound, as if the three overlapped perfectly."""
    return max(self)

  @property
  def bound(self) -> str:
    """The name of the largest bound."""
    return self._fields[self.index(self.seconds)]


def measure(compiled: Any) -> Cost:
  """Returns the cost that the compiler states for a program.

  FLOPs and traffic of a loop's body count once, however often it runs.

  Args:
    compiled: a `jax.stages.Compiled`; its figures are those of one device.
  """
  memory = compiled.memory_analysis()
  counted = compiled.cost_analysis() or {}
  return Cost(
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.generated_code_size_in_bytes,
    counted.get("flops", math.nan),
    counted.get("bytes accessed", math.nan),
    tuple(find_collectives(compiled.as_text())),
  )


def needed_bytes(message: str) -> float:
  """Reads the bytes that a refused program would need; 0 if not stated."""
  stated = re.search(r"required[^(]*\(([\d.]+)([KMGT])\)", message)
  if stated is None:
    return 0
  return float(stated[1]) * 1024 ** ("KMGT".index(stated[2]) + 1)


def roofline(
  cost: Cost, target: hardware.Target, *, dtype: str = "bfloat16"
) -> Roofline:
  """Computes lower bounds of the time of one run.

  Args:
    cost: of one run.
    target: the hardware it runs on.
    dtype: type of the inputs of its products.
  """
  chip = target.chip
  peak = chip.float32_flops if dtype == "float32" else chip.peak_flops
  return Roofline(
    cost.flops / peak,
    cost.moved_bytes / chip.hbm_bandwidth,
    cost.sent_bytes / target.bandwidth,
  )


def find_collectives(text: str) -> list[Collective]:
  """Lists the collectives in a compiled program's HLO text.

  A collective that is started and awaited by two instructions counts once, and
  so does one in the body of a loop. One of a single chip sends nothing and is
  left out.
  """
  collectives: list[Collective] = []
  groups: dict[str, int] = {}
  everybody = _everybody(text)
  for line in text.splitlines():
    match = _INSTRUCTION.match(line)
    if match is None:
      continue
    # Only the second half states the result, only the first the groups.
    if match["half"] == "-start":
      groups[match["name"]] = _group_size(line, everybody)
      continue
    operand = _OPERAND.search(line)
    group_size = groups[operand[1]] if operand else _group_size(line, everybody)
    if group_size > 1:
      num_bytes = _num_bytes(match["shapes"])
      collectives.append(Collective(match["kind"], num_bytes, group_size))
  return collectives


def _everybody(text: str) -> int:
  """Reads the number of devices off the first line of a module."""
  header = text.partition("\n")[0]
  counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", header)
  return math.prod(map(int, counts))


def _group_size(line: str, everybody: int) -> int:
  """Reads `replica_groups`, in any of its three notations."""
  if table := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
    return int(table[1])
  if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
    return listed[1].count(",") + 1
  if named := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
    axes = re.findall(r"'([^']+)'", named[2])
    return math.prod(int(sizes[axis]) for axis in axes)
  return everybody


def _num_bytes(shapes: str) -> int:
  """Counts an HLO shape or tuple, such as (f32[8]{0}, bf16[2,3]{1,0})."""
  total = 0
  for name, bits, sides in _ARRAY.findall(shapes):
    width = 8 if name == "pred" else int(bits or 0)
    total += math.prod(map(int, filter(None, sides.split(",")))) * width
  return total // 8

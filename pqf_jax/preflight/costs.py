"""What a compiled program costs a chip: memory, FLOPs, traffic, collectives."""

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
# Of a second half, whether or not its shape stands before it.
_OPERAND = re.compile(r"-done\(.*?%?([\w.-]+)\)(?:,|$)")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")


class Collective(NamedTuple):
  """One exchange between chips.

  Attributes:
    kind: one of `KINDS`.
    num_bytes: of its result on one chip.
    group_size: chips that take part together.
  """

  kind: str
  num_bytes: int
  group_size: int

  @property
  def sent_bytes(self) -> float:
    """That a chip sends at least, as in a ring (Patarasuk and Yuan, 2009)."""
    size, others = self.num_bytes, self.group_size - 1
    return {
      "all-reduce": 2 * size * others / self.group_size,
      "all-gather": size * others / self.group_size,
      "reduce-scatter": size * others,  # the result is one share
      "all-to-all": size * others / self.group_size,
      "collective-permute": size,
    }[self.kind]


class Cost(NamedTuple):
  """What one run of a program costs each chip.

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
    """That the chip sends to others."""
    return sum(collective.sent_bytes for collective in self.collectives)


class Roofline(NamedTuple):
  """Seconds below which a program cannot stay, by what bounds it.

  Attributes:
    flops: were it only computing.
    hbm: were it only reading and writing.
    links: were it only sending.
  """

  flops: float
  hbm: float
  links: float

  @property
  def seconds(self) -> float:
    """The largest, as if the three overlapped perfectly."""
    return max(self)

  @property
  def bound(self) -> str:
    """What the largest is."""
    return self._fields[self.index(self.seconds)]


def measure(compiled: Any) -> Cost:
  """The cost that the compiler states of a program.

  FLOPs and traffic of a loop's body count once, however often it runs.

  Args:
    compiled: a `jax.stages.Compiled`, partitioned: all is per device.
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
  """What the compiler says that a program it refused would need, or 0."""
  stated = re.search(r"required[^(]*\(([\d.]+)([KMGT])\)", message)
  if stated is None:
    return 0
  return float(stated[1]) * 1024 ** ("KMGT".index(stated[2]) + 1)


def roofline(
  cost: Cost, target: hardware.Target, *, dtype: str = "bfloat16"
) -> Roofline:
  """Lower bounds of the time of one run.

  Args:
    cost: of one run.
    target: on which it runs.
    dtype: of the inputs of its products.
  """
  chip = target.chip
  peak = chip.float32_flops if dtype == "float32" else chip.peak_flops
  return Roofline(
    cost.flops / peak,
    cost.moved_bytes / chip.hbm_bandwidth,
    cost.sent_bytes / target.bandwidth,
  )


def find_collectives(text: str) -> list[Collective]:
  """The collectives of a compiled program's HLO text.

  One that is started and awaited by two instructions counts once; one in the
  body of a loop, once; one of a single chip, which sends nothing, not at all.
  """
  found, groups = [], {}
  everybody = _everybody(text)
  for line in text.splitlines():
    match = _INSTRUCTION.match(line)
    if match is None:
      continue
    # Only the second half has the result alone, only the first the groups.
    if match["half"] == "-start":
      groups[match["name"]] = _group_size(line, everybody)
      continue
    if match["half"] == "-done":
      group_size = groups[_OPERAND.search(line)[1]]
    else:
      group_size = _group_size(line, everybody)
    if group_size > 1:
      num_bytes = _num_bytes(match["shapes"])
      found.append(Collective(match["kind"], num_bytes, group_size))
  return found


def _everybody(text: str) -> int:
  """Devices that the module runs on, from its first line."""
  header = text.partition("\n")[0]
  counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", header)
  return math.prod(map(int, counts))


def _group_size(line: str, everybody: int) -> int:
  """Of `replica_groups`, in any of its three notations."""
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
  """Of an HLO shape or tuple of shapes, such as (f32[8]{0}, bf16[2,3]{1,0})."""
  total = 0
  for name, bits, sides in _ARRAY.findall(shapes):
    width = 8 if name == "pred" else int(bits or 0)
    total += math.prod(map(int, filter(None, sides.split(",")))) * width
  return total // 8

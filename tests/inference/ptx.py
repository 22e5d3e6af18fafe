"""Runs programs in the part of NVIDIA's PTX that our kernels use, with NumPy.

All threads of a block take an instruction together; of a branch they have to
agree. Blocks run one after the other. An access outside of the buffers fails.
"""

import re

import numpy as np

_GAP = 4096  # bytes between buffers, where nothing is
_INSTRUCTION = re.compile(r"(?:@(\w+) )?([\w.:]+)(?: (.*))?;")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")


def run(source, arrays, result, *, num_blocks, num_threads, shared_size):
  """Runs a kernel whose operands are arrays, a result and shared memory.

  Returns the result, an array like `result`, of which every element has to be
  written.
  """
  memory = _Memory([*arrays, result])
  for block in range(num_blocks):
    _Block(source, memory, block, num_threads, shared_size).run()
  assert memory.is_written[-1].all(), "results are left out"
  return memory.buffers[-1].view(result.dtype).reshape(result.shape)


class _Memory:
  """Buffers at addresses."""

  def __init__(self, arrays):
    self.buffers = [
      np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy()
      for array in arrays
    ]
    self.is_written = [np.zeros(b.size, bool) for b in self.buffers]
    sizes = [b.size + -b.size % _GAP + _GAP for b in self.buffers]
    self.starts = _GAP + np.cumsum([0, *sizes[:-1]])

  def at(self, addresses, size):
    """Returns a buffer, whether it is written, and the places of bytes."""
    index = np.searchsorted(self.starts, addresses[0], side="right") - 1
    places = addresses[:, None] - self.starts[index] + np.arange(size)
    buffer = self.buffers[index]
    assert (places >= 0).all() and (places < buffer.size).all(), "outside"
    assert (addresses % size == 0).all(), "unaligned"
    return buffer, self.is_written[index], places


class _Block:
  """The threads of a block, and their registers as 64 bits each."""

  def __init__(self, source, memory, block, num_threads, shared_size):
    self.memory, self.num_threads = memory, num_threads
    self.shared = np.full(shared_size, 0xAB, np.uint8)
    self.lines = [line.strip() for line in source.splitlines()]
    self.registers = {
      "%tid.x": np.arange(num_threads, dtype=np.uint64),
      "%ctaid.x": np.full(num_threads, block, np.uint64),
      **{f"${i}": self._all(start) for i, start in enumerate(memory.starts)},
      f"${len(memory.starts)}": self._all(0),
    }

  def _all(self, value):
    return np.full(self.num_threads, value, np.uint64)

  def run(self):
    line = 0
    while line < len(self.lines):
      line = self._step(line) + 1

  def _step(self, line):
    text = self.lines[line]
    if text in "{}" or text.startswith(".reg") or text.endswith(":"):
      return line
    predicate, name, operands = _INSTRUCTION.fullmatch(text).groups()
    operands = _OPERAND.findall(operands or "")
    active = np.ones(self.num_threads, bool)
    if predicate:
      active = self.registers[predicate].astype(bool)
    kind, *details = name.split(".")
    if kind == "bra":
      assert active.all() or not active.any(), "threads part"
      return self.lines.index(operands[0] + ":") if active.all() else line
    if kind in ("ld", "st"):
      self._move(kind, details, operands, active)
    elif kind == "mma":
      assert active.all()
      self._mma(*map(_names, operands))
    elif kind != "bar":
      values = [self._value(operand) for operand in operands[1:]]
      result = _COMPUTE[kind](details, *values)
      self._write(operands[0], result, active)
    return line

  def _value(self, operand):
    if operand in self.registers:
      return self.registers[operand]
    if operand.startswith("0f"):
      return self._all(int(operand[2:], 16))
    return self._all(int(operand))

  def _write(self, name, values, active):
    # What was never written is no number that a test could expect.
    before = self.registers.get(name, self._all(0x7FC0DEAD7FC0DEAD))
    self.registers[name] = np.where(active, values, before)

  def _move(self, kind, details, operands, active):
    """Loads or stores registers."""
    address, registers = operands if kind == "st" else operands[::-1]
    base, _, offset = address.strip("[]").partition("+")
    names = _names(registers)
    size = int(details[-1][1:]) // 8
    if not active.any():
      return
    addresses = self.registers[base][active].astype(np.int64) + int(offset or 0)
    assert (addresses % (size * len(names)) == 0).all(), "unaligned"
    for i, name in enumerate(names):
      if details[0] == "global":
        where = self.memory.at(addresses + i * size, size)
      else:
        places = addresses[:, None] + i * size + np.arange(size)
        where = self.shared, None, places
      buffer, is_written, places = where
      if kind == "st":
        words = self.registers[name][active].view(np.uint8).reshape(-1, 8)
        buffer[places] = words[:, :size]
        if is_written is not None:
          is_written[places] = True
      else:
        words = np.zeros((len(places), 8), np.uint8)
        words[:, :size] = buffer[places]
        values = self._all(0)
        values[active] = words.reshape(-1).view(np.uint64)
        self._write(name, values, active)

  def _mma(self, results, left, right, sums):
    """Multiplies [16, 16] and [16, 8] in each warp, as the PTX manual says."""
    group, member = np.divmod(np.arange(32), 4)
    a = np.zeros((self.num_threads // 32, 16, 16), np.float32)
    b = np.zeros((len(a), 16, 8), np.float32)
    for i, name in enumerate(left):
      for half, values in enumerate(_halves(self.registers[name])):
        column = 2 * member + 8 * (i // 2) + half
        a[:, group + 8 * (i % 2), column] = values.reshape(-1, 32)
    for i, name in enumerate(right):
      for half, values in enumerate(_halves(self.registers[name])):
        b[:, 2 * member + 8 * i + half, group] = values.reshape(-1, 32)
    c = a @ b
    for i, (result, before) in enumerate(zip(results, sums, strict=True)):
      values = c[:, group + 8 * (i // 2), 2 * member + i % 2].reshape(-1)
      total = _floats(self.registers[before]) + values
      self.registers[result] = _bits(total)


def _names(operand):
  return [name.strip() for name in operand.strip("{}").split(",")]


def _floats(values):
  return values.astype(np.uint32).view(np.float32)


def _bits(floats):
  return np.asarray(floats, np.float32).view(np.uint32).astype(np.uint64)


def _halves(values):
  """Returns the two bfloat16 of a word, the low one first."""
  return _floats(values << 16 & 0xFFFFFFFF), _floats(values & 0xFFFF0000)


def _rounded(floats):
  """Returns the bits of the nearest bfloat16, of two the even one."""
  bits = _bits(_floats(floats))
  return bits + 0x7FFF + (bits >> 16 & 1) >> 16


def _convert(details, *values):
  if details[1] == "bf16":
    return _rounded(values[0])
  return _rounded(values[0]) << 16 | _rounded(values[1])


def _add(details, left, right):
  if details == ["f32"]:
    return _bits(_floats(left) + _floats(right))
  return left + right


def _multiply(details, left, right):
  product = left * right
  assert details[0] == "wide" or (product < 2**32).all()
  return product


def _compare(details, left, right):
  return {"lt": left < right, "ne": left != right}[details[0]].astype(np.uint64)


_COMPUTE = {
  "add": _add,
  "and": lambda _, a, b: a & b,
  "bfe": lambda _, a, start, size: a >> start & (1 << size) - 1,
  "cvt": _convert,
  "cvta": lambda _, a: a,
  "div": lambda _, a, b: a // b,
  "mad": lambda details, a, b, c: _multiply(details, a, b) + c,
  "mov": lambda _, a: a,
  "mul": _multiply,
  "rem": lambda _, a, b: a % b,
  "setp": _compare,
  "shr": lambda _, a, b: a >> b,
  "sub": lambda _, a, b: a - b,
}

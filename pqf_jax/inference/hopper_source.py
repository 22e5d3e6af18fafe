"""The program of one thread of the kernel in `hopper`, in NVIDIA's PTX.

PTX because Pallas's Mosaic GPU has neither loads from shared memory at
addresses that are data nor a view of the registers of a matrix product.

The matrix units multiply 16 outputs by 8 rows, 16 inputs at once, and want of
each thread the weights of outputs g and g + 8 (g = lane // 4) at 4 inputs that
only the activations have to share. A codeword of 8 inputs is thus two products'
worth of one thread: what a thread loads is what it multiplies. The threads of a
group g share outputs, and each of the four has positions of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

# Groups of a warp, which share the outputs and rows of a matrix product, and
# threads of a group, which share the positions.
GROUPS = 8
MEMBERS = 4
THREADS = 32

# Codewords that a thread has under way to shared memory.
_COPIED_AT_ONCE = 4


class Plan(NamedTuple):
  """What the program is made for.

  Attributes:
    num_rows: B, of activations.
    num_positions: M, a multiple of `joined`.
    c_out: C_out, a multiple of `outputs`.
    num_codes: K.
    length: D, one of 4, 8 and 16.
    code_bytes: of a code, 1 or 2.
    joined: consecutive positions whose codes of an output lie side by side: all
      that 32 bits hold, or 1.
    book_bytes: of an entry of the codebook: 2 for bfloat16, 4 for float32.
    out_bytes: of a result, as for the codebook.
    outputs: consecutive outputs of a group, 4, 8 or 16.
    warps: that share the positions of a block.
    splits: blocks that share the positions of an output.
    copies: of the codebook in shared memory, a power of two. As many as fit
      into one access of 128 bytes keep the threads of it apart.
    ahead: steps whose codes a thread loads at once; a step is of `joined`
      positions.
  """

  num_rows: int
  num_positions: int
  c_out: int
  num_codes: int
  length: int
  code_bytes: int
  joined: int
  book_bytes: int
  out_bytes: int
  outputs: int
  warps: int
  splits: int
  copies: int
  ahead: int

  @property
  def tile(self) -> int:
    """Returns the outputs of a block."""
    return GROUPS * self.outputs

  @property
  def num_tiles(self) -> int:
    """Returns how many blocks share all outputs."""
    return -(-self.c_out // self.tile)

  @property
  def row_tiles(self) -> int:
    """Returns the matrix products that share the rows."""
    return -(-self.num_rows // GROUPS)

  @property
  def stride(self) -> int:
    """Returns the steps of all threads that are taken together."""
    return MEMBERS * self.warps * self.splits

  @property
  def num_steps(self) -> int:
    """Returns the steps of all threads."""
    return self.num_positions // self.joined

  @property
  def joined_bytes(self) -> int:
    """Returns the bytes of the codes of an output in a step."""
    return self.joined * self.code_bytes

  @property
  def code_words(self) -> int:
    """Returns the words of a thread's codes in a step."""
    return self.outputs * self.joined_bytes // 4

  @property
  def input_words(self) -> int:
    """Returns the words of a row of activations in a step."""
    return self.joined * self.length // 2

  @property
  def piece(self) -> int:
    """Returns the bytes of a codeword that one load takes."""
    return min(16, 2 * self.length)

  @property
  def book_size(self) -> int:
    """Returns the bytes of all copies of the codebook."""
    return 2 * self.length * self.num_codes * self.copies

  @property
  def shared_size(self) -> int:
    """Returns the bytes of shared memory."""
    return self.book_size + 4 * self.warps * self.num_rows * self.tile


def write(plan: Plan) -> str:
  """Returns the program.

  Its operands: $0 activations [B, M * D] bfloat16, $1 codebook [K, D], $2 codes
  [M / joined, C_out, joined], $3 results [splits, B, C_out], $4 shared memory.
  """
  steps = -(-plan.num_steps // plan.stride)
  chunks = -(-steps // plan.ahead)
  body = [*_start(plan), *_load(plan, "a"), *_fill(plan), "bar.sync 0;"]
  if chunks == 1:
    body += _multiply(plan, "a")
  else:
    body += [f"mov.u32 chunk, {chunks};", "AGAIN:"]
    body += [*_load(plan, "b"), *_multiply(plan, "a"), *_advance(plan)]
    body += ["sub.u32 chunk, chunk, 1;", "setp.ne.u32 p, chunk, 0;"]
    body += ["@p bra AGAIN;"]
  body += [*_share(plan), "bar.sync 0;", *_finish(plan)]
  return "\n".join(["{", *_registers(plan), *body, "}"])


def _registers(plan: Plan) -> Iterator[str]:
  """Declares the registers."""
  sums = 2 * plan.outputs * plan.row_tiles
  yield ".reg .pred p, q, here, has_outputs, is_row<2>;"
  yield ".reg .b16 half;"
  yield ".reg .b32 thread, lane, warp, group, member, block, tile, split;"
  yield ".reg .b32 first, output, step, row, chunk, book, sums, index;"
  yield ".reg .b32 code, place, column, left<8>, right<8>, word<8>;"
  yield ".reg .b64 inputs, codebook, codes, results, code_at, at;"
  yield ".reg .b64 input_at<2>;"
  yield f".reg .f32 sum<{sums}>, total, part, entry<{4 * plan.length}>;"
  for name in "ab":
    yield f".reg .b32 code_{name}<{plan.ahead * plan.code_words}>;"
    words = plan.ahead * plan.row_tiles * plan.input_words
    yield f".reg .b32 input_{name}<{words}>;"


def _start(plan: Plan) -> Iterator[str]:
  """Says where a thread's codes and activations are."""
  for name, operand in (
    *(("inputs", 0), ("codebook", 1)),
    *(("codes", 2), ("results", 3)),
  ):
    yield f"cvta.to.global.u64 {name}, ${operand};"
  yield "mov.u32 thread, %tid.x;"
  yield "mov.u32 block, %ctaid.x;"
  yield "and.b32 lane, thread, 31;"
  yield "shr.u32 warp, thread, 5;"
  yield "shr.u32 group, lane, 2;"
  yield "and.b32 member, lane, 3;"
  yield f"rem.u32 tile, block, {plan.num_tiles};"
  yield f"div.u32 split, block, {plan.num_tiles};"
  yield f"mul.lo.u32 first, tile, {plan.tile};"
  yield f"mad.lo.u32 output, group, {plan.outputs}, first;"
  yield f"setp.lt.u32 has_outputs, output, {plan.c_out};"
  yield f"mad.lo.u32 step, split, {plan.warps}, warp;"
  yield f"mad.lo.u32 step, step, {MEMBERS}, member;"
  yield f"mul.wide.u32 at, step, {plan.c_out * plan.joined_bytes};"
  yield "add.u64 code_at, codes, at;"
  yield f"mul.wide.u32 at, output, {plan.joined_bytes};"
  yield "add.u64 code_at, code_at, at;"
  yield f"and.b32 place, lane, {plan.copies - 1};"
  yield f"mad.lo.u32 book, place, {plan.piece}, $4;"
  for tile in range(plan.row_tiles):
    yield f"add.u32 row, group, {tile * GROUPS};"
    yield f"setp.lt.u32 is_row{tile}, row, {plan.num_rows};"
    yield f"mul.wide.u32 at, row, {2 * plan.num_positions * plan.length};"
    yield f"add.u64 input_at{tile}, inputs, at;"
    yield f"mul.wide.u32 at, step, {4 * plan.input_words};"
    yield f"add.u64 input_at{tile}, input_at{tile}, at;"
  for index in range(2 * plan.outputs * plan.row_tiles):
    yield f"mov.f32 sum{index}, 0f00000000;"


def _load(plan: Plan, name: str) -> Iterator[str]:
  """Loads the codes and activations of some steps; 0 where there are none."""
  words = plan.input_words
  for step in range(plan.ahead):
    yield f"setp.lt.u32 here, step, {plan.num_steps};"
    yield "and.pred p, here, has_outputs;"
    first = step * plan.code_words
    yield from _fetch(f"code_{name}", first, plan.code_words, "code_at")
    for tile in range(plan.row_tiles):
      yield f"and.pred p, here, is_row{tile};"
      first = (step * plan.row_tiles + tile) * words
      yield from _fetch(f"input_{name}", first, words, f"input_at{tile}")
      step_bytes = 4 * plan.stride * words
      yield f"add.u64 input_at{tile}, input_at{tile}, {step_bytes};"
    step_bytes = plan.stride * plan.c_out * plan.joined_bytes
    yield f"add.u64 code_at, code_at, {step_bytes};"
    yield f"add.u32 step, step, {plan.stride};"


def _fetch(name: str, first: int, count: int, address: str) -> Iterator[str]:
  """Loads words from global memory if `p`, or else 0."""
  for index in range(first, first + count):
    yield f"mov.b32 {name}{index}, 0;"
  for at in range(0, count, 4):
    words = _names(name, first + at, min(4, count - at))
    size = _vector(min(4, count - at))
    yield f"@p ld.global.nc{size}.b32 {words}, [{address}+{4 * at}];"


def _fill(plan: Plan) -> Iterator[str]:
  """Rounds the codebook to bfloat16, and copies it to shared memory."""
  total, threads = plan.num_codes * plan.copies, plan.warps * THREADS
  for first in range(0, total, _COPIED_AT_ONCE * threads):
    last = min(total, first + _COPIED_AT_ONCE * threads)
    for slot, start in enumerate(range(first, last, threads)):
      yield from _fetch_codeword(plan, start, slot)
    for slot, start in enumerate(range(first, last, threads)):
      yield from _place_codeword(plan, start, slot)


def _fetch_codeword(plan: Plan, start: int, slot: int) -> Iterator[str]:
  yield f"add.u32 index, thread, {start};"
  yield f"setp.lt.u32 p, index, {plan.num_codes * plan.copies};"
  yield f"shr.u32 code, index, {plan.copies.bit_length() - 1};"
  yield f"mul.wide.u32 at, code, {plan.length * plan.book_bytes};"
  yield "add.u64 at, codebook, at;"
  words = plan.length * plan.book_bytes // 4
  for first in range(0, words, 4):
    size = min(4, words - first)
    names = _names("entry", slot * plan.length + first, size)
    yield f"@p ld.global.nc{_vector(size)}.f32 {names}, [at+{4 * first}];"


def _place_codeword(plan: Plan, start: int, slot: int) -> Iterator[str]:
  yield f"add.u32 index, thread, {start};"
  yield f"setp.lt.u32 p, index, {plan.num_codes * plan.copies};"
  yield f"mad.lo.u32 place, index, {plan.piece}, $4;"
  entry, words = slot * plan.length, plan.length // 2
  for word in range(words):
    if plan.book_bytes == 2:
      yield f"mov.b32 word{word}, entry{entry + word};"
    else:
      low, high = entry + 2 * word, entry + 2 * word + 1
      yield f"cvt.rn.bf16x2.f32 word{word}, entry{high}, entry{low};"
  for offset, first, size in _pieces(plan):
    names = _names("word", first, size)
    yield f"@p st.shared{_vector(size)}.b32 [place+{offset}], {names};"


def _pieces(plan: Plan) -> Iterator[tuple[int, int, int]]:
  """Yields of a codeword's pieces: offset in bytes, first word, words."""
  size = plan.piece // 4
  apart = plan.num_codes * plan.copies * plan.piece
  for piece in range(plan.length // 2 // size):
    yield piece * apart, piece * size, size


def _multiply(plan: Plan, name: str) -> Iterator[str]:
  """Adds the products of the steps that are loaded."""
  for step, place, pair in itertools.product(
    range(plan.ahead), range(plan.joined), range(plan.outputs // 2)
  ):
    for side, which in (("left", 2 * pair), ("right", 2 * pair + 1)):
      start = 8 * plan.code_bytes * (which * plan.joined + place)
      word = step * plan.code_words + start // 32
      bits = f"{start % 32}, {8 * plan.code_bytes}"
      yield f"bfe.u32 code, code_{name}{word}, {bits};"
      yield f"mad.lo.u32 place, code, {plan.copies * plan.piece}, book;"
      for offset, first, size in _pieces(plan):
        names = _names(side, first, size)
        yield f"ld.shared{_vector(size)}.b32 {names}, [place+{offset}];"
    for tile, part in itertools.product(
      range(plan.row_tiles), range(plan.length // 4)
    ):
      first = (step * plan.row_tiles + tile) * plan.input_words
      at = first + place * plan.length // 2 + 2 * part
      yield _product(_sum(plan, pair, tile), f"input_{name}", at, 2 * part)


def _product(first_sum: int, inputs: str, first: int, word: int) -> str:
  """Returns a matrix product of weights `left`, `right` and activations."""
  sums = _names("sum", first_sum, 4)
  weights = ", ".join(
    f"{side}{word + i}" for i in range(2) for side in ("left", "right")
  )
  return (
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
    f"{sums}, {{{weights}}}, {_names(inputs, first, 2)}, {sums};"
  )


def _advance(plan: Plan) -> Iterator[str]:
  """Takes the steps that were loaded ahead."""
  for index in range(plan.ahead * plan.code_words):
    yield f"mov.b32 code_a{index}, code_b{index};"
  for index in range(plan.ahead * plan.row_tiles * plan.input_words):
    yield f"mov.b32 input_a{index}, input_b{index};"


def _share(plan: Plan) -> Iterator[str]:
  """Writes a warp's sums to shared memory, [warps, B, outputs of a block]."""
  yield f"add.u32 sums, $4, {plan.book_size};"
  yield f"mul.lo.u32 row, warp, {plan.num_rows};"
  yield "mad.lo.u32 row, member, 2, row;"
  yield f"mul.lo.u32 index, row, {plan.tile};"
  yield f"mad.lo.u32 index, group, {plan.outputs}, index;"
  yield "mad.lo.u32 place, index, 4, sums;"
  for tile, row in itertools.product(range(plan.row_tiles), range(2)):
    yield f"mad.lo.u32 index, member, 2, {tile * GROUPS + row};"
    yield f"setp.lt.u32 p, index, {plan.num_rows};"
    for pair in range(plan.outputs // 2):
      first = _sum(plan, pair, tile) + row
      offset = 4 * ((tile * GROUPS + row) * plan.tile + 2 * pair)
      both = f"{{sum{first}, sum{first + 2}}}"
      yield f"@p st.shared.v2.f32 [place+{offset}], {both};"


def _finish(plan: Plan) -> Iterator[str]:
  """Adds up the sums of all warps."""
  size, threads = plan.num_rows * plan.tile, plan.warps * THREADS
  yield f"mul.lo.u32 split, split, {plan.num_rows};"
  for start in range(0, size, threads):
    yield f"add.u32 index, thread, {start};"
    yield f"setp.lt.u32 p, index, {size};"
    yield "mad.lo.u32 place, index, 4, sums;"
    yield "mov.f32 total, 0f00000000;"
    for warp in range(plan.warps):
      yield f"@p ld.shared.f32 part, [place+{4 * warp * size}];"
      yield "add.f32 total, total, part;"
    yield f"div.u32 row, index, {plan.tile};"
    yield f"rem.u32 column, index, {plan.tile};"
    yield "add.u32 column, column, first;"
    yield f"setp.lt.u32 q, column, {plan.c_out};"
    yield "and.pred p, p, q;"
    yield "add.u32 row, row, split;"
    yield f"mul.wide.u32 at, row, {plan.c_out * plan.out_bytes};"
    yield "add.u64 at, results, at;"
    yield f"mul.wide.u32 code_at, column, {plan.out_bytes};"
    yield "add.u64 at, at, code_at;"
    if plan.out_bytes == 4:
      yield "@p st.global.f32 [at], total;"
    else:
      yield "cvt.rn.bf16.f32 half, total;"
      yield "@p st.global.b16 [at], half;"


def _sum(plan: Plan, pair: int, tile: int) -> int:
  """Returns the first of the four sums of two outputs and two rows."""
  return 4 * (pair * plan.row_tiles + tile)


def _names(name: str, first: int, count: int) -> str:
  names = ", ".join(f"{name}{index}" for index in range(first, first + count))
  return f"{{{names}}}" if count > 1 else names


def _vector(count: int) -> str:
  return f".v{count}" if count > 1 else ""

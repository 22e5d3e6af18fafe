"""Sums of rows by segment that do not depend on the order of addition.

Floating-point addition is not associative, so a scatter-add on many threads or
devices gives other bits at every run. Integer addition is associative: a number
x in [-1, 1] is cut into two int32 words,

    x = high * 2^-14 + low * 2^-29,    |high| <= 2^14,  0 <= low < 2^15,

and the words are added; a scatter on NVIDIA adds both at once, as one int64.
(K-means adds them in kernels where it has some: `pqf_jax.kmeans.backends`.) The
resolution is 2^-29 of the largest entry, where a float32 sum of n terms loses
up to n * 2^-24 of itself. A sum is then a function of the *set* of its rows:
not of their order, of the other segments, or of the number of devices.

This also avoids the float32 scatter-add that jaxlib 0.10.2 to 0.11.0 compile
into a compare-and-swap loop on NVIDIA, 450 to 2,000 times slower than an
integer one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

# Bits of a low word; a high word has one bit less, and a sign.
_WORD_BITS = 15

LOW_UNIT = 2.0**-_WORD_BITS
"""The value of 1 in a low word, where 1 in a high word has the value 1."""

# The number of words that can be added to an int32.
_MOST_ADDED = 2 ** (31 - _WORD_BITS)

# The number of digits, of 8 bits, that can be added to a float32.
_MOST_MULTIPLIED = 2**16

# Private copies of the sums on an accelerator: threads that add to the same
# address wait for each other. 37 us with 1 copy, 22 with 8, 22 with 32 at
# N = 262144, 11 float32 columns and 256 segments on an H200.
_NUM_COPIES = 8

# Few segments get more copies, so that there are so many sums in all: without,
# sums of whole layers took 5 ms.
_LEAST_SLOTS = 4096


def segment_sum(
  rows: jax.Array, segments: jax.Array, num_segments: int
) -> jax.Array:
  """Sums the rows of every segment, the same bits at every run.

  Args:
    rows: [N, C] float. A NaN or infinity anywhere in a column makes all sums
      of the column NaN.
    segments: [N] integer, the segment of each row.
    num_segments: K; rows of segments beyond it are dropped.

  Returns:
    [K, C] sums in the type of `rows`, 0 for an empty segment. The error is at
    most 2^-29 of the column's largest entry for each row added, and the
    rounding of the result. Two words cannot hold a float64 number: those are
    added in floating point, in the order that XLA chooses.
  """
  if rows.dtype == jnp.float64:
    return jax.ops.segment_sum(rows, segments, num_segments)
  values = rows.astype(jnp.float32)
  scale = power_of_two(jnp.abs(values).max(axis=0, initial=0))
  words = to_words(values / scale[None, :])
  sums = merge(*integer_sums(words, segments, num_segments))
  return (from_words(sums) * scale[None, :]).astype(rows.dtype)


def column_sum(
  columns: jax.Array, segments: jax.Array, num_segments: int
) -> jax.Array:
  """Sums columns by segment, like `segment_sum`, by matrix products.

  For TPUs, which pad the last axis to 128: a few long columns instead of many
  short rows.

  Args:
    columns: [C, N] float32 or less.
    segments: [N] integer, the segment of each entry of a column.
    num_segments: K.

  Returns:
    [K, C], to the bit the result of `segment_sum`.
  """
  values = columns.astype(jnp.float32)
  scale = power_of_two(jnp.abs(values).max(axis=1, initial=0))
  pairs = jnp.stack(split_words(values / scale[:, None]), axis=1)
  words = pairs.reshape(2 * values.shape[0], values.shape[1])
  sums = merge(*_column_products(num_segments, words, segments))
  return (from_words(sums) * scale[None, :]).astype(columns.dtype)


def power_of_two(largest: jax.Array) -> jax.Array:
  """Returns the least power of two above each entry.

  Division by it is exact, and leaves numbers within [-1, 1]. It is 1 for an
  entry of 0, and NaN for one that is not finite.
  """
  _, exponent = jnp.frexp(jnp.where(jnp.isfinite(largest), largest, 1))
  # Beyond 2^±126 the scale or its inverse would not be a normal float32.
  scale = jnp.ldexp(jnp.float32(1), jnp.clip(exponent, -126, 126))
  return jnp.where(jnp.isfinite(largest), scale, jnp.nan)


def to_words(fractions: jax.Array) -> jax.Array:
  """Cuts [..., C] float32 in [-1, 1] into [..., 2 C] int32: low, high, ..."""
  pairs = jnp.stack(split_words(fractions), axis=-1)
  return pairs.reshape(*fractions.shape[:-1], 2 * fractions.shape[-1])


def split_words(fractions: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Cuts float32 in [-1, 1] into low and high words, int32; 0 for NaN."""
  scaled = fractions * 2.0 ** (_WORD_BITS - 1)
  high = jnp.floor(scaled)
  low = to_word(scaled - high)
  return _to_integer(low), _to_integer(high)


def _to_integer(word: jax.Array) -> jax.Array:
  return jnp.where(jnp.isnan(word), 0, word).astype(jnp.int32)


def to_word(fractions: jax.Array) -> jax.Array:
  """Rounds float32 in [0, 1] to a low word: a whole number below 2^15."""
  largest = 2**_WORD_BITS - 1
  return jnp.minimum(jnp.round(fractions * (largest + 1)), largest)


def from_words(sums: jax.Array) -> jax.Array:
  """Converts [..., 2 C] float32 sums of words to [..., C] sums of fractions."""
  pairs = sums.reshape(*sums.shape[:-1], sums.shape[-1] // 2, 2)
  low, high = pairs[..., 0], pairs[..., 1]
  return (high + low * LOW_UNIT) * 2.0 ** (1 - _WORD_BITS)


def integer_sums(
  words: jax.Array,
  segments: jax.Array,
  num_segments: int,
  *,
  most_added: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Sums int32 words by segment, exactly: low + high * 2^15.

  Args:
    words: [N, 2 C] int32 pairs: 0 to 2^15 - 1, then at most 2^14 in absolute
      value.
    segments: [N] integer, the segment of each row.
    num_segments: K.
    most_added: the number of consecutive rows within which the rows of any one
      segment lie; None: N.

  Returns:
    low and high, [K, 2 C] int32, which may be added up over devices.
  """
  most_added = words.shape[0] if most_added is None else most_added
  num_needed = 1
  while num_needed * _MOST_ADDED < most_added:
    num_needed *= 2
  num_copies = max(num_needed, _NUM_COPIES, _LEAST_SLOTS // num_segments)
  return lax.platform_dependent(
    words,
    segments,
    cpu=functools.partial(_sums, _add, num_segments, num_needed),
    cuda=functools.partial(_sums, _add_pairs, num_segments, num_copies),
    tpu=lambda words, segments: _column_products(
      num_segments, words.T, segments
    ),
    default=functools.partial(_sums, _add, num_segments, num_copies),
  )


def merge(low: jax.Array, high: jax.Array) -> jax.Array:
  """Returns `low + high * 2^15` as float32, rounded twice."""
  # Each integer gets one representation, in whatever parts it was added up.
  high = high + (low >> 15)
  low = low & 0x7FFF
  return high.astype(jnp.float32) * 2.0**15 + low.astype(jnp.float32)


def to_digits(words: jax.Array, *, axis: int) -> jax.Array:
  """Cuts words into bfloat16 digits: their lower 8 bits, then their upper ones.

  A matrix unit multiplies digits exactly. `axis` becomes twice as long.
  """
  digits = jnp.concatenate([words & 0xFF, words >> 8], axis=axis)
  return digits.astype(jnp.bfloat16)


def from_digits(sums: jax.Array, *, axis: int) -> tuple[jax.Array, jax.Array]:
  """Converts int32 sums of digits to those of words: low + high * 2^15."""
  low, high = jnp.split(sums, 2, axis=axis)
  high = high + (low >> 8)
  return (low & 0xFF) + ((high & 0x7F) << 8), high >> 7


def _sums(
  add: Callable[[jax.Array, jax.Array, int], jax.Array],
  num_segments: int,
  num_copies: int,
  words: jax.Array,
  segments: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Sums words as two int32 [K, 2 C], low + high * 2^15, without overflow.

  Row i is added to copy i % `num_copies`. The rows of a segment lie within
  `most_added` consecutive rows, so no copy gets more than its share of them.
  """
  copies = jnp.arange(words.shape[0], dtype=jnp.int32) % num_copies
  slots = segments.astype(jnp.int32) * num_copies + copies
  sums = add(words, slots, num_segments * num_copies)
  sums = sums.reshape(num_segments, num_copies, words.shape[1])
  parts = sums & 0x7FFF, sums >> 15
  low, high = (part.sum(axis=1, dtype=jnp.int32) for part in parts)
  return low, high


def _column_products(
  num_segments: int, words: jax.Array, segments: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Sums words [2 C, N] as products of their digits with 0 and 1."""
  count = words.shape[1]
  rows = min(_MOST_MULTIPLIED, max(1, count))
  words = jnp.pad(words, ((0, 0), (0, -count % rows)))
  # The padding of the last part adds zeros.
  segments = jnp.pad(segments.astype(jnp.int32), (0, -count % rows))
  digits = to_digits(words, axis=0)
  digits = digits.reshape(digits.shape[0], -1, rows)
  owners = jnp.arange(num_segments, dtype=jnp.int32)[:, None, None]
  chosen = (segments.reshape(1, -1, rows) == owners).astype(jnp.bfloat16)
  sums = lax.dot_general(
    chosen,
    digits,
    (((2,), (2,)), ((1,), (1,))),
    preferred_element_type=jnp.float32,
  )
  low, high = from_digits(sums.astype(jnp.int32), axis=2)
  return low.sum(axis=0, dtype=jnp.int32), high.sum(axis=0, dtype=jnp.int32)


def _add(words: jax.Array, slots: jax.Array, num_slots: int) -> jax.Array:
  sums = jnp.zeros((num_slots, words.shape[1]), jnp.int32)
  return sums.at[slots].add(words, mode="drop")


def _add_pairs(words: jax.Array, slots: jax.Array, num_slots: int) -> jax.Array:
  """Adds a low and a high word at once, as int64.

  Nothing is carried from the lower half: low words are not negative, and their
  sum stays below 2^31. 105 us instead of 204 at N = 3072000, 10 words and 9216
  segments on an H200.
  """
  pairs = words.reshape(words.shape[0], words.shape[1] // 2, 2)
  with jax.enable_x64(True):
    wide = lax.bitcast_convert_type(pairs, jnp.int64)
    sums = jnp.zeros((num_slots, wide.shape[1]), jnp.int64)
    sums = sums.at[slots].add(wide, mode="drop")
    halves = lax.bitcast_convert_type(sums, jnp.int32)
  return halves.reshape(num_slots, words.shape[1])

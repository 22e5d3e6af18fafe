"""Codes of b bits each, one after the other, lowest bit first.

Eight codes are b whole bytes: code j of eight begins j * b bits after them, at
the same byte and bit in every eight. So each of the eight is read, or written,
for thousands of eights at once.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pqf_jax.core import plan as plans
from pqf_jax.core import trees, vq_array

# Eights that are handled together: a few temporary arrays of a megabyte, and
# calls of NumPy so long that they run beside those of other threads.
_CHUNK = 1 << 16
_WHOLE_BYTES = {8: np.uint8, 16: np.uint16}


def pack_codes(codes: trees.Array, num_codes: int) -> np.ndarray:
  """Packs codes into uint8 [ceil(N * log2(K) / 8)], lowest bit first."""
  bits = plans.code_bits(num_codes)
  flat = np.asarray(codes).reshape(-1)
  if bits in _WHOLE_BYTES:
    return flat.astype(_WHOLE_BYTES[bits]).view(np.uint8)
  packed = np.zeros((-(-flat.size // 8), bits), np.uint8)
  for start in range(0, len(packed), _CHUNK):
    rows = packed[start : start + _CHUNK]
    eights = np.zeros((len(rows), 8), np.uint32)
    part = flat[8 * start : 8 * (start + _CHUNK)]
    eights.reshape(-1)[: part.size] = part
    for j in range(8):
      first, shift = divmod(j * bits, 8)
      shifted = eights[:, j] << np.uint32(shift)
      for k in range(-(-(shift + bits) // 8)):
        rows[:, first + k] |= (shifted >> np.uint32(8 * k)).astype(np.uint8)
  return packed.reshape(-1)[: plans.code_bytes(flat.size, num_codes)]


def unpack_codes(packed: np.ndarray, num_codes: int, count: int) -> np.ndarray:
  """Unpacks codes into [count] of the smallest unsigned type."""
  bits = plans.code_bits(num_codes)
  if bits in _WHOLE_BYTES:
    return packed.view(_WHOLE_BYTES[bits])[:count].copy()
  # A code of 9 bits may begin at bit 7 of a byte, and end in the next.
  word = np.uint16 if bits <= 9 else np.uint32
  num_eights = -(-count // 8)
  codes = np.empty((num_eights, 8), vq_array.code_dtype(num_codes))
  for start in range(0, num_eights, _CHUNK):
    rows = codes[start : start + _CHUNK]
    part = packed[start * bits : (start + _CHUNK) * bits]
    padded = np.zeros(len(rows) * bits + 4, np.uint8)
    padded[: part.size] = part
    for j in range(8):
      first, shift = divmod(j * bits, 8)
      words: Any = np.ndarray(len(rows), word, padded, first, bits)
      rows[:, j] = (words >> word(shift)) & word((1 << bits) - 1)
  return codes.reshape(-1)[:count]


def count_codes(codes: np.ndarray, num_codes: int) -> np.ndarray:
  """Returns how many of the codes are 0, 1, ..., K - 1: int64 [K]."""
  flat = codes.reshape(-1)
  # NumPy counts integers of 64 bits: eight times the memory of all at once.
  parts = np.array_split(flat, max(1, -(-flat.size // _CHUNK)))
  counts = [np.bincount(part, minlength=num_codes) for part in parts]
  return np.sum(counts, axis=0)


def unpack_traced(packed: jax.Array, num_codes: int, count: int) -> jax.Array:
  """Unpacks codes as `unpack_codes` does, in a program of JAX."""
  bits = plans.code_bits(num_codes)
  num_eights = -(-count // 8)
  padded = jnp.pad(packed, (0, num_eights * bits - packed.size))
  columns = padded.reshape(num_eights, bits).astype(jnp.uint32)
  codes = []
  for j in range(8):
    first, shift = divmod(j * bits, 8)
    word = columns[:, first] >> shift
    for k in range(1, -(-(shift + bits) // 8)):
      word |= columns[:, first + k] << (8 * k - shift)
    codes.append(word & ((1 << bits) - 1))
  flat = jnp.stack(codes, axis=1).reshape(-1)[:count]
  return flat.astype(vq_array.code_dtype(num_codes))

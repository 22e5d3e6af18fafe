import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from pqf_jax.packing import bits


def packed_bit_by_bit(codes, num_bits):
  """The oracle: NumPy packs a table of bits, lowest first."""
  table = codes.reshape(-1, 1).astype(np.uint32) >> np.arange(num_bits) & 1
  return np.packbits(table.astype(np.uint8), bitorder="little")


@hypothesis.given(st.integers(1, 16), st.integers(1, 100), st.integers(0, 9))
@hypothesis.settings(deadline=None, max_examples=50)
def test_codes_take_exactly_their_bits(num_bits, count, seed):
  rng = np.random.default_rng(seed)
  num_codes = int(rng.integers(2 ** (num_bits - 1) + 1, 2**num_bits + 1))
  codes = rng.integers(0, num_codes, count)
  packed = bits.pack_codes(codes, num_codes)
  np.testing.assert_array_equal(packed, packed_bit_by_bit(codes, num_bits))
  unpacked = bits.unpack_codes(packed, num_codes, count)
  np.testing.assert_array_equal(unpacked, codes)
  assert unpacked.dtype == (np.uint8 if num_codes <= 256 else np.uint16)


@pytest.mark.parametrize("num_bits", [3, 8, 10, 16])
def test_chunks_join_without_a_seam(num_bits):
  codes = np.random.default_rng(0).integers(0, 1 << num_bits, 600_003)
  packed = bits.pack_codes(codes, 1 << num_bits)
  np.testing.assert_array_equal(packed, packed_bit_by_bit(codes, num_bits))
  np.testing.assert_array_equal(
    bits.unpack_codes(packed, 1 << num_bits, codes.size), codes
  )

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from pqf_jax import errors
from pqf_jax.core import blocks


def _kernel(*shape):
  return jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_order_is_that_of_torch_convolutions(channels):
  kernel = _kernel(3, 2, 4, 5)  # HWIO
  oihw = np.transpose(np.asarray(kernel), (3, 2, 0, 1))
  got = blocks.BlockSpec(channels).to_blocks(kernel)
  np.testing.assert_array_equal(
    got.reshape(-1, channels * 6), oihw.reshape(-1, channels * 6)
  )


def test_order_is_that_of_torch_linear_layers():
  kernel = _kernel(8, 3)  # [in, out]
  got = blocks.BlockSpec(4).to_blocks(kernel)
  np.testing.assert_array_equal(got.reshape(-1, 4), kernel.T.reshape(-1, 4))


@hypothesis.given(
  taps=st.lists(st.integers(1, 3), max_size=2),
  blocks_in=st.integers(1, 3),
  c_out=st.integers(1, 3),
  channels=st.integers(1, 2),
  swap=st.booleans(),
)
@hypothesis.settings(deadline=None, max_examples=20)
def test_from_blocks_undoes_to_blocks(taps, blocks_in, c_out, channels, swap):
  ends = [blocks_in * channels, c_out]
  # A transposed convolution's kernel may have its axes the other way around.
  spec = blocks.BlockSpec(
    channels, *(((-1,), (-2,)) if swap else ((-2,), (-1,)))
  )
  kernel = _kernel(*taps, *(ends[::-1] if swap else ends))
  cut = spec.to_blocks(kernel)
  assert cut.shape == spec.layout(kernel.shape)
  np.testing.assert_array_equal(spec.from_blocks(cut, kernel.shape), kernel)


def test_heads_are_blocks():
  query = _kernel(8, 2, 6)  # [features, heads, depth]
  spec = blocks.BlockSpec(4, (0,), (1, 2))
  np.testing.assert_array_equal(
    spec.to_blocks(query), np.transpose(query, (1, 2, 0)).reshape(12, 2, 4)
  )
  out = _kernel(2, 6, 8)  # [heads, depth, features]
  spec = blocks.BlockSpec(3, (0, 1), (2,))
  np.testing.assert_array_equal(
    spec.to_blocks(out), np.asarray(out).reshape(12, 8).T.reshape(8, 4, 3)
  )
  np.testing.assert_array_equal(
    spec.from_blocks(spec.to_blocks(out), out.shape), out
  )


def test_rows_of_an_embedding_are_cut_along_their_features():
  table = _kernel(9, 4)
  got = blocks.BlockSpec(2, (1,), (0,)).to_blocks(table)
  np.testing.assert_array_equal(got, table.reshape(9, 2, 2))


@pytest.mark.parametrize("axes", [(), (0,), (1,), (2,), (0, 1), (1, 2)])
def test_layers_of_a_stack_are_taken_apart(axes):
  whole = _kernel(2, 3, 4, 5)[(0,) * (2 - len(axes))]
  spec = blocks.make_spec(
    1,
    blocks.KernelAxes(
      *((axis,) for axis in range(whole.ndim) if axis not in axes),
      axes,
    ),
    whole.ndim,
  )
  assert spec == blocks.BlockSpec(1, stack_axes=axes)
  layers = np.moveaxis(np.asarray(whole), axes, range(len(axes)))
  layers = layers.reshape(-1, *spec.layer_shape(whole.shape))
  for index, layer in enumerate(layers):
    np.testing.assert_array_equal(spec.take_layer(whole, index), layer)
  assert spec.whole_axes((-2, -1), whole.ndim) == tuple(
    axis for axis in range(whole.ndim) if axis not in axes
  )


def test_depthwise_kernels_have_one_block_a_channel():
  assert blocks.BlockSpec(1).layout((3, 3, 1, 32)) == (32, 1, 9)


def test_indivisible_channels_are_refused_with_both_numbers():
  with pytest.raises(
    errors.InputError, match=r"6 input channels.*4 channels.*: 1, 2, 3, 6"
  ):
    blocks.BlockSpec(4).layout((3, 3, 6, 8))

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from pqf_jax import errors
from pqf_jax.core import channels

AXES = {
  "a/kernel": (None, channels.ChannelAxis("g")),
  "b/kernel": (channels.ChannelAxis("g", outer=2, inner=3), None),
}


def _tree():
  return {
    "a": {"kernel": jnp.arange(12.0).reshape(3, 4)},
    "b": {"kernel": jnp.arange(48.0).reshape(24, 2)},
    "c": jnp.ones(5),
  }


def test_outer_and_inner_stay_where_they_are():
  permutation = np.array([2, 0, 3, 1], np.int32)
  got = channels.apply_permutations(_tree(), AXES, {"g": permutation})
  kernel = np.arange(48.0).reshape(2, 4, 3, 2)[:, permutation]
  np.testing.assert_array_equal(got["b"]["kernel"], kernel.reshape(24, 2))
  np.testing.assert_array_equal(
    got["a"]["kernel"], np.arange(12.0).reshape(3, 4)[:, permutation]
  )


@hypothesis.given(st.permutations(range(4)))
@hypothesis.settings(deadline=None, max_examples=20)
def test_the_inverse_restores_every_bit(permutation):
  permutations = {"g": np.array(permutation, np.int32)}
  inverse = {"g": np.argsort(permutation)}
  there = channels.apply_permutations(_tree(), AXES, permutations)
  back = channels.apply_permutations(there, AXES, inverse)
  for name in ("a", "b"):
    np.testing.assert_array_equal(back[name]["kernel"], _tree()[name]["kernel"])


def test_group_sizes():
  assert channels.group_sizes(_tree(), AXES) == {"g": 4}


@pytest.mark.parametrize(
  ("axes", "message"),
  [
    ({"missing": (None,)}, "the tree lacks.*missing"),
    ({"a/kernel": (None,)}, r"a/kernel has shape \(3, 4\) but 1"),
    (
      AXES | {"c": (channels.ChannelAxis("g"),)},
      "c: axis 0.* 5, but group 'g' of 4",
    ),
  ],
)
def test_bad_tables_are_named(axes, message):
  with pytest.raises(errors.InputError, match=message):
    channels.group_sizes(_tree(), axes)


@pytest.mark.parametrize("bad", [[0, 1, 2], [0, 0, 1, 2]])
def test_what_is_no_permutation_is_refused(bad):
  with pytest.raises(errors.InputError, match="'g' needs a permutation of 4"):
    channels.apply_permutations(_tree(), AXES, {"g": np.array(bad)})

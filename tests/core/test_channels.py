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


def test_every_layer_of_a_stack_moves_in_its_own_order():
  tree = {"a": np.arange(24).reshape(2, 3, 4), "b": np.arange(6).reshape(3, 2)}
  own, shared = channels.ChannelAxis("own"), channels.ChannelAxis("shared")
  axes = {
    "a": (None, own._replace(stacked=(0,)), shared),
    "b": (own._replace(stacked=(1,)), None),
  }
  groups = [f"own, layer {i}" for i in range(2)]
  assert channels.group_sizes(tree, axes) == {
    **dict.fromkeys(groups, 3),
    "shared": 4,
  }
  drawn = {
    groups[0]: np.array([2, 0, 1]),
    groups[1]: np.array([1, 0, 2]),
    "shared": np.array([3, 1, 0, 2]),
  }
  got = channels.apply_permutations(tree, axes, drawn)
  for i, group in enumerate(groups):
    expected = tree["a"][i][drawn[group]][:, drawn["shared"]]
    np.testing.assert_array_equal(got["a"][i], expected)
    np.testing.assert_array_equal(got["b"][:, i], tree["b"][drawn[group], i])
  # A layer without an order stays as it is.
  got = channels.apply_permutations(tree, axes, {groups[1]: drawn[groups[1]]})
  np.testing.assert_array_equal(got["a"][0], tree["a"][0])
  np.testing.assert_array_equal(got["a"][1], tree["a"][1][[1, 0, 2]])


def test_stacks_of_stacks_count_their_layers_in_order():
  tree = {"a": jnp.arange(36).reshape(2, 3, 3, 2)}
  axes = {"a": (None, None, channels.ChannelAxis("g", stacked=(3, 0)), None)}
  order = np.array([2, 0, 1])
  got = channels.apply_permutations(tree, axes, {"g, layer 1.0": order})["a"]
  expected = np.array(tree["a"])
  expected[0, :, :, 1] = expected[0, :, :, 1][:, order]
  np.testing.assert_array_equal(got, expected)


def _segments(*ends):
  return tuple(
    channels.ChannelAxis(group, start=start, stop=stop)
    for group, start, stop in ends
  )


def test_segments_move_apart_and_the_rest_stays():
  tree = {"a": np.arange(30).reshape(3, 10)}
  axes = {"a": (None, _segments(("g", 0, 3), ("h", 4, 6), ("g", 6, 9)))}
  assert channels.group_sizes(tree, axes) == {"g": 3, "h": 2}
  drawn = {"g": np.array([2, 0, 1]), "h": np.array([1, 0])}
  got = channels.apply_permutations(tree, axes, drawn)
  order = [2, 0, 1, 3, 5, 4, 8, 6, 7, 9]
  np.testing.assert_array_equal(got["a"], tree["a"][:, order])
  only = channels.select(axes, lambda axis: axis.group == "h")
  assert only == {"a": (None, *_segments(("h", 4, 6)))}
  got = channels.apply_permutations(tree, only, {"h": np.array([1, 0])})
  order = [0, 1, 2, 3, 5, 4, 6, 7, 8, 9]
  np.testing.assert_array_equal(got["a"], tree["a"][:, order])


@pytest.mark.parametrize("start", [0, 1])
def test_flattened_axes_carry_the_same_entries(start):
  axis = channels.ChannelAxis("g", 2, 1, start, start + 4 if start else None)
  tree = {"a": np.arange(6 * (start + 4)).reshape(3, start + 4, 2)}
  flat = {"a": tree["a"].reshape(-1)}
  drawn = {"g": np.array([1, 0])}
  split = {"a": (None, axis, None)}
  joined = {"a": (tuple(axis.flattened(3, start + 4, 2)),)}
  np.testing.assert_array_equal(
    channels.apply_permutations(flat, joined, drawn)["a"],
    channels.apply_permutations(tree, split, drawn)["a"].reshape(-1),
  )


@pytest.mark.parametrize(
  ("axes", "message"),
  [
    ({"missing": (None,)}, "the tree lacks.*missing"),
    ({"a/kernel": (None,)}, r"a/kernel has shape \(3, 4\) but 1"),
    (
      AXES | {"c": (channels.ChannelAxis("g"),)},
      "c: axis 0.* 5, but group 'g' of 4",
    ),
    ({"c": (_segments(("g", 0, 3), ("h", 2, 5)),)}, "segment 2:5 of group 'h'"),
    ({"c": _segments(("g", 3, 6))}, "c: axis 0.* 5, but the segment 3:6"),
    (
      {"c": (_segments(("g", 0, 3), ("g", 3, 5)),)},
      "c: axis 0: .*3:5.* 2, but group 'g' of 3",
    ),
    (
      {"a/kernel": (None, channels.ChannelAxis("g", stacked=(1,)))},
      r"a/kernel: axis 1 has the stacked axes \(1,\); .* among \[0\]",
    ),
    (
      AXES | {"a/kernel": (None, channels.ChannelAxis("g", stacked=(0,)))},
      r"b/kernel: axis 0 has .*\[\] layers, but group 'g' for one of \[3\]",
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

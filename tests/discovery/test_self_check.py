"""The self-check has to notice every wrong tie, and nothing else."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from pqf_jax import errors
from pqf_jax.core import channels, trees
from pqf_jax.discovery import discover, self_check, tracing

pytestmark = pytest.mark.filterwarnings("error::UserWarning")

IMAGES = jnp.zeros((1, 6, 6, 3))


class Small(nn.Module):
  """A residual network with everything that can carry channels."""

  dtype: Any = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.Conv(6, (3, 3), dtype=self.dtype, name="stem")(x)
    y = nn.Conv(8, (3, 3), dtype=self.dtype, use_bias=False, name="conv1")(x)
    y = nn.relu(nn.BatchNorm(True, dtype=self.dtype, name="norm")(y))
    x = x + nn.ConvTranspose(6, (3, 3), dtype=self.dtype, name="conv2")(y)
    x = nn.max_pool(x, (3, 3), (3, 3))
    x = nn.Dense(10, dtype=self.dtype, name="fc1")(x.reshape(len(x), -1))
    return nn.Dense(4, dtype=self.dtype, name="fc2")(nn.tanh(x))


@pytest.fixture(scope="module", name="fresh")
def fresh_variables() -> Any:
  """As initialised: scales and variances one, biases and means zero."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(Small().init, jax.random.key(0), IMAGES)
  starts = {"kernel": rng.standard_normal, "scale": np.ones, "var": np.ones}
  return trees.nest(
    {
      path: starts.get(path.rpartition("/")[2], np.zeros)(leaf.shape)
      for path, leaf in trees.flatten(shapes).items()
    }
  )


@pytest.fixture(scope="module", name="axes")
def small_axes(fresh: Any) -> channels.ChannelAxes:
  return discover.infer_channels(Small().apply, fresh, IMAGES)


@pytest.fixture(scope="module", name="network")
def small_network(fresh: Any) -> self_check.CompiledNetwork:
  return compile_network(Small().apply, fresh, IMAGES)


def compile_network(
  apply_fn: tracing.ApplyFn, variables: Any, *inputs: Any
) -> self_check.CompiledNetwork:
  program = tracing.trace_program(apply_fn, variables, inputs)
  rng = np.random.default_rng(7)
  return self_check.compile_network(rng, program, variables, inputs)


def check(
  network: self_check.CompiledNetwork, axes: channels.ChannelAxes, seed: int = 7
) -> channels.ChannelAxes:
  return self_check.check_groups(np.random.default_rng(seed), network, axes)


def ties(axes: channels.ChannelAxes) -> list[tuple[str, int]]:
  return [
    (path, dim)
    for path, row in axes.items()
    for dim, axis in enumerate(row)
    if axis is not None
  ]


def drop(
  axes: channels.ChannelAxes, path: str, dim: int
) -> channels.ChannelAxes:
  row = list(axes[path])
  row[dim] = None
  return {**axes, path: tuple(row)}


def test_right_axes_pass_unchanged(fresh, axes):
  sizes = channels.group_sizes(fresh, axes)
  assert sizes == {"stem": 6, "conv1": 8, "fc1": 10}
  assert len(ties(axes)) == 15
  before = jax.tree.map(np.array, fresh)
  program = tracing.trace_program(Small().apply, fresh, (IMAGES,))
  key = jax.random.key(7)
  checked = self_check.check_program(key, program, fresh, axes, (IMAGES,))
  assert checked == axes
  assert jax.tree.all(jax.tree.map(np.array_equal, before, fresh))


def test_every_dropped_tie_is_noticed_and_named(fresh, axes, network):
  for path, dim in ties(axes):
    group = axes[path][dim].group
    with pytest.warns(UserWarning, match=rf"\['{group}'\] changes the outputs"):
      kept = check(network, drop(axes, path, dim))
    assert channels.group_sizes(fresh, kept).keys() == (
      channels.group_sizes(fresh, axes).keys() - {group}
    )


def test_a_network_of_little_precision_is_checked_in_float64(fresh, axes):
  """A tolerance fit for bfloat16 would let a forgotten bias through."""
  with jax.numpy_dtype_promotion("standard"):
    network = compile_network(Small(jnp.bfloat16).apply, fresh, IMAGES)
  assert check(network, axes) == axes
  with pytest.warns(UserWarning, match=r"\['conv1'\] changes the outputs"):
    check(network, drop(axes, "params/norm/bias", 0))


def test_transposed_axes_of_a_transposed_convolution_are_noticed(axes, network):
  row = axes["params/conv2/kernel"]
  swapped = {**axes, "params/conv2/kernel": (None, None, row[3], row[2])}
  with pytest.raises(errors.InputError, match="params/conv2/kernel"):
    check(network, swapped)


def test_wrong_order_of_flattened_features_is_noticed(fresh, axes, network):
  flattened, features = axes["params/fc1/kernel"]
  assert (flattened.outer, flattened.inner) == (4, 1)
  row = (flattened._replace(outer=1, inner=4), features)
  with pytest.warns(UserWarning, match=r"\['stem'\]"):
    kept = check(network, {**axes, "params/fc1/kernel": row})
  assert list(channels.group_sizes(fresh, kept)) == ["conv1", "fc1"]


def test_groups_of_two_are_really_permuted():
  params = {"first": np.eye(2), "second": np.eye(2)}
  network = compile_network(
    lambda p, x: jnp.tanh(x @ p["first"]) @ p["second"],
    params,
    jnp.ones((1, 2)),
  )
  axes = {"first": (None, channels.ChannelAxis("hidden"))}
  for seed in range(8):
    with pytest.warns(UserWarning, match=r"\['hidden'\] changes"):
      assert not check(network, axes, seed)


@pytest.mark.parametrize(
  "apply_fn",
  [
    lambda p, x: jnp.nan * (x @ p["first"] @ p["second"]),
    lambda p, x: x @ p["first"] @ p["second"] > 1e9,
    lambda p, x: jnp.zeros((0, 3)) @ (x @ p["first"] @ p["second"]).T,
  ],
  ids=["nan", "constant", "empty"],
)
def test_a_check_that_proves_nothing_warns(apply_fn):
  hidden = channels.ChannelAxis("hidden")
  params = {"first": np.ones((3, 5)), "second": np.ones((5, 3))}
  axes = {"first": (None, hidden), "second": (hidden, None)}
  network = compile_network(apply_fn, params, jnp.ones((1, 3)))
  with pytest.warns(UserWarning, match="proves nothing"):
    assert axes == check(network, axes)


def test_whole_numbers_of_the_output_have_to_agree_exactly():
  params = {"first": np.ones((3, 8))}
  axes = {"first": (None, channels.ChannelAxis("hidden"))}
  network = compile_network(
    lambda p, x: jnp.argsort((x @ p["first"])[0]), params, jnp.ones((1, 3))
  )
  with pytest.warns(UserWarning, match=r"\['hidden'\] changes"):
    assert not check(network, axes)


def test_what_cannot_run_in_float64_is_checked_in_its_own_precision():
  def run(p: Any, x: jax.Array) -> jax.Array:
    x = lax.bitcast_convert_type(x @ p["first"], jnp.uint32) >> 8 << 8
    return lax.bitcast_convert_type(x, jnp.float32) @ p["second"]

  rng = np.random.default_rng(0)
  params = {
    name: rng.standard_normal(shape).astype(np.float32)
    for name, shape in (("first", (3, 5)), ("second", (5, 3)))
  }
  hidden = channels.ChannelAxis("hidden")
  axes = {"first": (None, hidden), "second": (hidden, None)}
  with pytest.warns(UserWarning, match="cannot be run in float64") as caught:
    network = compile_network(run, params, jnp.ones((1, 3)))
  # Others may be of files that an earlier test left to the garbage collector.
  assert [warning.category for warning in caught].count(UserWarning) == 1
  assert axes == check(network, axes)
  with pytest.warns(UserWarning, match=r"\['hidden'\] changes"):
    check(network, drop(axes, "second", 0))


def test_axes_of_unknown_variables_are_refused(axes, network):
  with pytest.raises(errors.InputError, match="params/none/kernel"):
    check(network, {**axes, "params/none/kernel": (None,)})

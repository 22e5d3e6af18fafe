"""The permutation stage on variable trees, against `numpy.cov`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pqf_jax import errors, permute
from pqf_jax.core import blocks, channels
from pqf_jax.core import plan as plans
from pqf_jax.permutation import objective
from pqf_jax.permutation import search as permutation_search

GROUP = channels.ChannelAxis("g")


def _kernels(**shapes):
  """Draws kernels of these shapes, whose channels differ in scale."""
  rng = np.random.default_rng(0)

  def kernel(shape):
    scale = rng.lognormal(size=(shape[-2], 1))
    return jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)

  return {name: {"kernel": kernel(shape)} for name, shape in shapes.items()}


def _layer(num_channels, num_codes=4):
  return plans.LayerPlan(blocks.BlockSpec(num_channels), num_codes, 1)


def _numpy_log_det(variables, plan):
  """Averages over the sub-vectors of all kernels, in the plan's layout."""
  total, count = 0.0, 0
  for path, layer in plan.items():
    kernel = variables[path.split("/")[0]]["kernel"]
    sub_vectors = np.asarray(layer.spec.to_blocks(kernel), np.float64)
    sub_vectors = sub_vectors.reshape(-1, sub_vectors.shape[-1])
    _, log_det = np.linalg.slogdet(np.cov(sub_vectors, rowvar=False))
    total += len(sub_vectors) * log_det
    count += len(sub_vectors)
  return total / count


@pytest.mark.parametrize(
  "shapes, axes, plan",
  [
    (
      {"conv": (3, 3, 16, 8)},
      {"conv/kernel": (None, None, GROUP, None)},
      {"conv/kernel": _layer(2)},
    ),
    (
      # A dense layer behind flattened features: 6 places of 8 channels.
      {"fc": (48, 10)},
      {"fc/kernel": (channels.ChannelAxis("g", outer=6), None)},
      {"fc/kernel": _layer(4)},
    ),
    (
      # Heads: 8 channels of 3 entries, 2 of which share a sub-vector.
      {"out": (24, 10)},
      {"out/kernel": (channels.ChannelAxis("g", inner=3), None)},
      {"out/kernel": _layer(6)},
    ),
    (
      {"conv": (3, 3, 16, 8), "down": (1, 1, 16, 20), "fc": (32, 5)},
      {
        "conv/kernel": (None, None, GROUP, None),
        "down/kernel": (None, None, GROUP, None),
        "fc/kernel": (channels.ChannelAxis("g", outer=2), None),
      },
      {
        "conv/kernel": _layer(2),
        "down/kernel": _layer(8),
        "fc/kernel": _layer(4),
      },
    ),
  ],
)
def test_reports_are_of_the_sub_vectors_before_and_after(shapes, axes, plan):
  variables = _kernels(**shapes)
  permuted, permutations, (report,) = permute.permute_channels(
    jax.random.key(0), variables, axes, plan
  )
  assert report.accepted and report.note == ""
  assert report.consumers == tuple(plan)
  assert report.log_det_after < report.log_det_before
  for got, tree in (
    (report.log_det_before, variables),
    (report.log_det_after, permuted),
  ):
    np.testing.assert_allclose(got, _numpy_log_det(tree, plan), atol=1e-3)
  expected = channels.apply_permutations(variables, axes, permutations)
  jax.tree.map(np.testing.assert_array_equal, permuted, expected)


TWO_GROUPS = {
  "a/kernel": (channels.ChannelAxis("h"), GROUP),
  "b/kernel": (GROUP, None),
}
TWO_PLAN = {"a/kernel": _layer(4), "b/kernel": _layer(4)}


def test_a_group_depends_on_the_key_and_on_itself_only():
  variables = _kernels(a=(32, 64), b=(64, 32))

  def permutations_of(seed, axes=TWO_GROUPS, plan=TWO_PLAN):
    key = jax.random.key(seed)
    _, permutations, reports = permute.permute_channels(
      key, variables, axes, plan
    )
    assert list(permutations) == [report.group for report in reports]
    return permutations

  first = permutations_of(0)
  assert first["g"].dtype == np.int32
  np.testing.assert_array_equal(first["g"], permutations_of(0)["g"])
  np.testing.assert_array_equal(
    first["g"],
    permutations_of(0, {"b/kernel": (GROUP, None)}, {"b/kernel": _layer(4)})[
      "g"
    ],
  )
  assert np.any(first["g"] != permutations_of(1)["g"])


def test_results_do_not_depend_on_how_many_threads_search(monkeypatch):
  variables = _kernels(a=(3, 3, 64, 64), b=(3, 3, 64, 32), c=(32, 8))
  axes = {
    "a/kernel": (None, None, GROUP, channels.ChannelAxis("h")),
    "b/kernel": (None, None, channels.ChannelAxis("h"), None),
    "c/kernel": (channels.ChannelAxis("small"), None),
  }
  plan = {f"{name}/kernel": _layer(2) for name in "abc"}

  def run(num_threads):
    monkeypatch.setattr(permute, "_MOST_THREADS", num_threads)
    monkeypatch.setattr("os.cpu_count", lambda: num_threads)
    progress = []
    _, permutations, reports = permute.permute_channels(
      jax.random.key(0), variables, axes, plan, on_group=progress.append
    )
    assert sorted(progress) == sorted(reports)
    assert [report.group for report in reports] == ["g", "h", "small"]
    assert list(permutations) == ["g", "h", "small"]
    return permutations, reports

  permutations, reports = run(1)
  for num_threads in (2, 5):
    again, again_reports = run(num_threads)
    assert again_reports == reports  # log-determinants too, to the last bit
    for group, permutation in permutations.items():
      np.testing.assert_array_equal(again[group], permutation)


def test_groups_that_cannot_gain_are_left_alone_and_say_why():
  variables = _kernels(
    one=(3, 3, 8, 8), cut=(24, 4), none=(8, 4), dead=(8, 4), flat=(1, 8)
  )
  variables["dead"]["kernel"] *= 0
  names = ("one", "cut", "none", "dead", "flat")
  axes = {
    "one/kernel": (None, None, channels.ChannelAxis("one"), None),
    "cut/kernel": (channels.ChannelAxis("cut", inner=3), None),
    "none/kernel": (channels.ChannelAxis("none"), None),
    "dead/kernel": (channels.ChannelAxis("dead"), None),
    "flat/kernel": (channels.ChannelAxis("flat"), None),
  }
  widths = {"one": 1, "cut": 4, "dead": 2, "flat": 1}
  plan = {f"{name}/kernel": _layer(n) for name, n in widths.items()}
  progress = []
  permuted, permutations, reports = permute.permute_channels(
    jax.random.key(0), variables, axes, plan, on_group=progress.append
  )
  assert not permutations
  jax.tree.map(np.testing.assert_array_equal, permuted, variables)
  assert tuple(progress) == reports
  assert tuple(report.group for report in reports) == names
  notes = {report.group: report.note for report in reports}
  assert "one channel in a sub-vector" in notes["one"]
  assert "cut" in notes["cut"] and "4 entries" in notes["cut"]
  assert "no compressed kernel" in notes["none"]
  assert "all zeros" in notes["dead"]
  assert "one channel" in notes["flat"]
  assert not any(report.accepted or report.consumers for report in reports)


def test_bad_weights_are_named_before_any_search():
  variables = _kernels(a=(8, 16), b=(16, 8))
  variables["b"]["kernel"] = variables["b"]["kernel"].at[3, 2].set(jnp.nan)

  def search(rng, grams):
    raise AssertionError("searched")

  with pytest.raises(errors.InputError, match="b/kernel has 1 NaN"):
    permute.permute_channels(
      jax.random.key(0), variables, TWO_GROUPS, TWO_PLAN, search=search
    )


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_singular_covariances_are_regularized_and_reported(scale):
  # Half of the channels are dead, or multiples of the others.
  variables = _kernels(b=(16, 32))
  kernel = variables["b"]["kernel"]
  variables["b"]["kernel"] = kernel.at[8:].set(scale * kernel[:8])
  _, _, (report,) = permute.permute_channels(
    jax.random.key(0),
    variables,
    {"b/kernel": (GROUP, None)},
    {"b/kernel": _layer(2)},
  )
  assert report.accepted
  assert np.isfinite([report.log_det_before, report.log_det_after]).all()
  assert "b/kernel has a singular covariance" in report.note


def test_an_order_that_is_worse_is_not_taken():
  variables = _kernels(b=(16, 32))

  def search(rng, grams):
    size = len(grams[0].sums)
    trials = [
      objective.evaluate(grams, rng.permutation(size)) for _ in range(200)
    ]
    return max(trials, key=lambda order: order.log_det)

  permuted, permutations, (report,) = permute.permute_channels(
    jax.random.key(0),
    variables,
    {"b/kernel": (GROUP, None)},
    {"b/kernel": _layer(4)},
    search=search,
  )
  assert not report.accepted and "not better" in report.note
  assert report.log_det_after > report.log_det_before
  assert not permutations
  jax.tree.map(np.testing.assert_array_equal, permuted, variables)


def test_k_means_may_overrule_the_log_determinant():
  # b is a function of a, so that (a, b) has 3 values, but uncorrelated with it.
  # The two a are correlated, but have 9 values together.
  rng = np.random.default_rng(0)
  first = rng.integers(-1, 2, size=200)
  second = np.where(rng.random(200) < 0.8, first, rng.integers(-1, 2, size=200))
  rows = [first, first**2 - 2 / 3, second, second**2 - 2 / 3]
  variables = {"b": {"kernel": jnp.asarray(np.stack(rows), jnp.float32)}}
  axes = {"b/kernel": (GROUP, None)}
  plan = {"b/kernel": _layer(2, num_codes=4)}

  def report(**knobs):
    key = jax.random.key(0)
    return permute.permute_channels(key, variables, axes, plan, **knobs)[2][0]

  assert report().accepted
  judged = report(kmeans_steps=20)
  assert not judged.accepted and "not better" in judged.note
  assert judged.log_det_after < judged.log_det_before - 0.1
  assert judged.error_before < 1e-6 < 0.01 < judged.error_after


def test_the_authors_search_can_be_asked_for():
  variables = _kernels(b=(64, 32))
  _, permutations, (report,) = permute.permute_channels(
    jax.random.key(0),
    variables,
    {"b/kernel": (GROUP, None)},
    {"b/kernel": _layer(4)},
    search=permutation_search.search_like_authors,
  )
  assert report.accepted
  np.testing.assert_array_equal(np.sort(permutations["g"]), np.arange(64))


def test_groups_may_be_divided_over_processes():
  variables = _kernels(a=(3, 3, 16, 8), b=(24, 10), c=(2, 12, 6))
  axes = {
    "a/kernel": (None, None, GROUP, None),
    "b/kernel": (channels.ChannelAxis("h"), None),
    "c/kernel": (None, channels.ChannelAxis("i", stacked=(0,)), None),
  }
  stack = plans.LayerPlan(blocks.BlockSpec(4, stack_axes=(0,)), 4, 1)
  plan = {"a/kernel": _layer(2), "b/kernel": _layer(4), "c/kernel": stack}
  key = jax.random.key(3)
  moved, permutations, reports = permute.permute_channels(
    key, variables, axes, plan
  )
  assert len(permutations) == 4
  gathered = {}

  class Waiting(Exception):
    """Raised where a process would wait for the others."""

  def wait(records):
    gathered.update(json.loads(json.dumps(records)))
    raise Waiting

  def run(mine, gather, on_group):
    return permute.permute_channels(
      key,
      variables,
      axes,
      plan,
      share=lambda costs: mine,
      gather=gather,
      on_group=on_group,
    )

  shares = (["h", "i, layer 1"], ["g", "i, layer 0"])
  for mine in shares:
    with pytest.raises(Waiting):
      run(mine, wait, lambda report: None)
  assert gathered.keys() == {"g", "h", "i, layer 0", "i, layer 1"}
  for mine in shares:
    progress = []
    result = run(mine, lambda records: gathered, progress.append)
    jax.tree.map(np.testing.assert_array_equal, result[0], moved)
    jax.tree.map(np.testing.assert_array_equal, result[1], permutations)
    assert result[2] == reports
    assert len(progress) == 4

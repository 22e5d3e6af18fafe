"""Stage 1: reorders channels so that they quantize better."""

import functools
import math
import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pqf_jax import kmeans
from pqf_jax.core import channels, trees
from pqf_jax.core import plan as plans
from pqf_jax.permutation import consumers, covariance, objective
from pqf_jax.permutation import search as permutation_search
from pqf_jax.runtime import threads

PyTree = Any
Search = Callable[[np.random.Generator, objective.Grams], objective.ScoredOrder]

# Ridge of every covariance, relative to the mean square of a weight: 1e-10
# moves the log-determinants of ResNet-18 by less than 1e-4.
RELATIVE_RIDGE = 1e-10
# Groups that are searched at the same time. Each one holds the Gram matrices of
# its kernels: 170 MB for 512 channels of 3x3.
_MOST_THREADS = 8


class GroupReport(NamedTuple):
  """Result of the search for one channel group.

  Attributes:
    group: its name.
    consumers: paths of the compressed kernels that its order changes; the
      figures below are of these.
    size: channels.
    log_det_before: natural log-determinant of the covariance of the consumers'
      sub-vectors, averaged over the sub-vectors; 0 without consumers.
    log_det_after: the same in the new order.
    error_before: relative squared error of a short k-means, averaged over the
      consumers' weights; 0 where it was not requested.
    error_after: the same in the new order.
    accepted: whether the new order is applied.
    note: why it is not, or a remark.
  """

  group: str
  consumers: tuple[str, ...]
  size: int
  log_det_before: float
  log_det_after: float
  error_before: float
  error_after: float
  accepted: bool
  note: str


class _Group(NamedTuple):
  """A channel group to search.

  Attributes:
    consumers: the kernels that decide; at least one.
    notes: on the other kernels.
    seed: of the search.
    kmeans_key: random number generator key of the k-means.
  """

  consumers: list[consumers.Consumer]
  notes: list[str]
  seed: np.ndarray
  kmeans_key: jax.Array


class _SearchResult(NamedTuple):
  """Result of the search of one group, before it is judged.

  Attributes:
    before: the present order of the channels.
    after: the order that the search returned.
    notes: for the report.
  """

  before: objective.ScoredOrder
  after: objective.ScoredOrder
  notes: list[str]


def permute_channels(
  key: jax.Array,
  variables: PyTree,
  axes: channels.ChannelAxes,
  plan: plans.CompressionPlan,
  *,
  search: Search = permutation_search.search_permutation,
  kmeans_steps: int = 0,
  share: Callable[[Mapping[str, float]], Collection[str]] = tuple,
  gather: Callable[[dict[str, Any]], dict[str, Any]] = dict,
  on_group: Callable[[GroupReport], None] = lambda report: None,
) -> tuple[PyTree, dict[str, np.ndarray], tuple[GroupReport, ...]]:
  """Reorders the channels of every group so that quantizing loses less.

  Minimizes the log-determinant of the covariance of the sub-vectors (section
  3.2 of arXiv 2010.15703), averaged over all kernels that read the group. A
  group's result depends on the key, its name and its kernels only, and an order
  is applied only if it lowers this objective.

  Args:
    key: random number generator key, consumed.
    variables: dense variable tree.
    axes: which axes are tied (`discover.discover_channels`).
    plan: which kernels are compressed, and how.
    search: (random number generator, Gram matrices of the kernels) -> order;
      `permutation_search.search_like_authors` is the paper's. Several groups
      are searched at the same time, each in a thread of its own.
    kmeans_steps: if not 0, every order is also judged by the squared error of
      k-means of so many steps, and applied only if it lowers that as well. Off
      by default: for ResNet-18 on one H200, 20 steps add 12 % to the stage and
      7 s of compilation, and agree with the log-determinant in all 12 groups.
    share: {group: cost of its search} -> the groups that this process searches,
      so that several processes divide the work.
    gather: {name: JSON} of this process's groups -> the same of all processes.
    on_group: called after each group, for progress; the order may vary.

  Returns:
    (variables in the new order, {group: int32 permutation} of the groups that
    were reordered, one report for each group); both in the order of `axes`.

  Raises:
    InputError: NaN or infinite weights, before any search; or axes that do not
      fit the tree (`channels.group_sizes`).
  """
  sizes = channels.group_sizes(variables, axes)
  consumers_of = consumers.find_consumers(variables, axes, plan)
  groups: dict[str, _Group] = {}
  permutations: dict[str, np.ndarray] = {}
  reports: dict[str, GroupReport] = {}

  def finish(report: GroupReport) -> None:
    reports[report.group] = report
    on_group(report)

  def judge(name: str, result: _SearchResult) -> None:
    permutations[name] = result.after.permutation.astype(np.int32)
    finish(_judge(name, groups[name], result, kmeans_steps))

  for name, size in sizes.items():
    usable, notes = consumers_of.get(name, ([], []))
    if usable:
      groups[name] = _group(key, name, usable, notes)
    else:
      note = "; ".join(notes) or "no compressed kernel reads it"
      finish(GroupReport(name, (), size, 0.0, 0.0, 0.0, 0.0, False, note))
  costs = {name: _effort(group) for name, group in groups.items()}
  tasks = {
    name: functools.partial(_search_group, groups[name], search)
    for name in sorted(share(costs), key=lambda name: -costs[name])
  }
  threads.run_tasks(tasks, judge, max_threads=_MOST_THREADS)
  gathered = gather(
    {
      name: (reports[name]._asdict(), permutations[name].tolist())
      for name in tasks
    }
  )
  for name in groups.keys() - tasks.keys():
    report, permutation = gathered[name]
    permutations[name] = np.array(permutation, np.int32)
    finish(GroupReport(**report | {"consumers": tuple(report["consumers"])}))
  accepted = {
    name: permutations[name] for name in sizes if reports[name].accepted
  }
  ordered = tuple(reports[name] for name in sizes)
  return _reorder(variables, axes, accepted), accepted, ordered


def _group(
  key: jax.Array,
  name: str,
  usable: list[consumers.Consumer],
  notes: list[str],
) -> _Group:
  """Gives a group its random numbers, derived from its name."""
  salt = np.uint32(zlib.crc32(name.encode()))
  seed, kmeans_key = _random_numbers(key, salt)
  return _Group(usable, notes, np.asarray(seed), kmeans_key)


@jax.jit
def _random_numbers(
  key: jax.Array, salt: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the seed of a search and the key of its k-means; compiled once."""
  search_key, kmeans_key = jax.random.split(jax.random.fold_in(key, salt))
  return jax.random.bits(search_key, (4,), np.uint32), kmeans_key


def _effort(group: _Group) -> float:
  """Returns the entries of the Gram matrices; the time grows with them."""
  return sum(
    math.prod(consumer.weights.shape[1:]) ** 2 for consumer in group.consumers
  )


def _reorder(
  variables: PyTree,
  axes: channels.ChannelAxes,
  permutations: channels.Permutations,
) -> PyTree:
  """Applies the permutations on the host, where nothing is compiled."""
  flat = trees.flatten(variables)
  host = jax.device_get({path: flat[path] for path in axes})
  moved = channels.apply_permutations(host, axes, permutations)
  places = {path: getattr(flat[path], "sharding", None) for path in axes}
  return trees.replace(
    variables,
    {
      path: jax.device_put(moved[path], place) for path, place in places.items()
    },
  )


def _search_group(group: _Group, search: Search) -> _SearchResult:
  """Searches an order for one group, and scores the present one."""
  grams = [
    covariance.channel_gram(
      consumer.weights, slots=consumer.slots, relative_ridge=RELATIVE_RIDGE
    )
    for consumer in group.consumers
  ]
  before = objective.evaluate(grams, np.arange(len(grams[0].sums)))
  best = search(np.random.default_rng(group.seed), grams)
  after = objective.evaluate(grams, best.permutation)
  singular = _singular(group.consumers, grams, (before, after))
  return _SearchResult(before, after, [*group.notes, *singular])


def _judge(
  name: str, group: _Group, result: _SearchResult, kmeans_steps: int
) -> GroupReport:
  """Decides whether the new order is applied, and notes why not."""
  before, after, notes = result
  accepted = after.log_det < before.log_det - objective.MIN_GAIN
  error_before = error_after = 0.0
  if accepted and kmeans_steps:
    error_before, error_after = (
      _kmeans_error(
        group.kmeans_key, group.consumers, order.permutation, kmeans_steps
      )
      for order in (before, after)
    )
    accepted = error_after < error_before
  if not accepted:
    notes = [*notes, "the new order is not better"]
  return GroupReport(
    name,
    tuple(consumer.path for consumer in group.consumers),
    len(after.permutation),
    before.log_det,
    after.log_det,
    error_before,
    error_after,
    accepted,
    "; ".join(notes),
  )


def _singular(
  usable: list[consumers.Consumer],
  grams: objective.Grams,
  compared: tuple[objective.ScoredOrder, ...],
) -> list[str]:
  """Names the kernels whose log-determinant is finite only by the ridge."""
  notes = []
  for index, (consumer, gram) in enumerate(zip(usable, grams, strict=True)):
    least = min(
      np.linalg.eigvalsh(covariance.covariance(gram, order.moments[index]))[0]
      for order in compared
    )
    if least < 2 * gram.ridge:
      notes.append(
        f"{consumer.path} has a singular covariance (dead, constant or "
        "duplicate channels, or too few sub-vectors): regularized"
      )
  return notes


def _kmeans_error(
  key: jax.Array,
  usable: list[consumers.Consumer],
  permutation: np.ndarray,
  steps: int,
) -> float:
  """Returns the relative squared error of k-means, averaged over weights."""
  lost, size = 0.0, 0
  for consumer in usable:
    ordered = consumer.weights[:, permutation]
    vectors = ordered.reshape(-1, consumer.slots * ordered.shape[2])
    result = kmeans.annealed_kmeans(
      key, jnp.asarray(vectors), num_codes=consumer.num_codes, num_steps=steps
    )
    error = float(result.distortion[-1]) / vectors.shape[1]
    # Not the variance: constant weights have none, and no error either.
    lost += error / float(np.mean(np.square(vectors))) * vectors.size
    size += vectors.size
  return lost / size

"""Stage 1: channels -> a better order, the function staying the same."""

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
Search = Callable[[np.random.Generator, objective.Grams], objective.Order]

# Ridge of every covariance, relative to the mean square of a weight: 1e-10
# moves the log-determinants of ResNet-18 by less than 1e-4.
RELATIVE_RIDGE = 1e-10
# Groups that are searched at the same time. Each one in work holds the Gram
# matrices of its kernels: 170 MB for 512 channels of 3x3.
_MOST_THREADS = 8


class GroupReport(NamedTuple):
  """What the search found for one channel group.

  Attributes:
    group: its name.
    children: paths of the compressed kernels that its order changes; the
      figures are of these.
    size: channels.
    log_det_before: natural log-determinant of the covariance of the children's
      sub-vectors, averaged over the sub-vectors; 0 without children.
    log_det_after: the same in the order that was found.
    error_before: relative squared error of a short k-means, averaged over the
      children's weights; 0 where it was not asked for.
    error_after: the same in the order that was found.
    accepted: whether that order was taken.
    note: why not, or anything else worth saying.
  """

  group: str
  children: tuple[str, ...]
  size: int
  log_det_before: float
  log_det_after: float
  error_before: float
  error_after: float
  accepted: bool
  note: str


class _Group(NamedTuple):
  """A channel group that is searched.

  Attributes:
    children: the kernels that decide; at least one.
    notes: on the other kernels.
    seed: of the search.
    kmeans_key: random number generator key of the k-means.
  """

  children: list[consumers.Reader]
  notes: list[str]
  seed: np.ndarray
  kmeans_key: jax.Array


class _Found(NamedTuple):
  """What the search of one group came to.

  Attributes:
    before: the order that the channels have.
    after: the order that was found.
    notes: what the report should say.
  """

  before: objective.Order
  after: objective.Order
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
  """Orders the channels of every group so that less is lost by quantizing.

  Minimizes the log-determinant of the covariance of the sub-vectors (section
  3.2 of arXiv 2010.15703), averaged over all kernels that read the group. A
  group's result depends on the key, its name and its kernels only, and an order
  is taken only if it lowers this objective.

  Args:
    key: random number generator key, consumed.
    variables: dense variable tree.
    axes: which axes are tied (`discover.discover_channels`).
    plan: which kernels are compressed, and how.
    search: (random number generator, Gram matrices of the kernels) -> order;
      `permutation_search.search_like_authors` is the paper's. Several groups
      are searched at the same time, each in a thread of its own.
    kmeans_steps: if not 0, every order is also judged by the squared error of
      k-means of so many steps, and taken only if it lowers that as well. Off by
      default: for ResNet-18 on one H200, 20 steps add 12 % to the stage and 7 s
      of compilation, and agree with the log-determinant in all 12 groups.
    share: {group: cost of its search} -> the groups that this process searches;
      of several, each one its own.
    gather: {name: JSON} of this process's groups -> the same of all processes.
    on_group: called after each group, for progress: as they are done, so in an
      order that may vary.

  Returns:
    (variables in the new order, {group: int32 permutation} of the groups that
    were reordered, one report for each group); both in the order of `axes`.

  Raises:
    InputError: NaN or infinite weights, found before any search; or axes that
      do not fit the tree (`channels.group_sizes`).
  """
  sizes = channels.group_sizes(variables, axes)
  readers_of = consumers.find_readers(variables, axes, plan)
  groups, permutations, reports = {}, {}, {}

  def finish(report: GroupReport) -> None:
    reports[report.group] = report
    on_group(report)

  def judge(name: str, found: _Found) -> None:
    permutations[name] = found.after.permutation.astype(np.int32)
    finish(_judge(name, groups[name], found, kmeans_steps))

  for name, size in sizes.items():
    children, notes = readers_of.get(name, ([], []))
    if children:
      groups[name] = _group(key, name, children, notes)
    else:
      note = "; ".join(notes) or "no compressed kernel reads it"
      finish(GroupReport(name, (), size, 0.0, 0.0, 0.0, 0.0, False, note))
  costs = {name: _effort(group) for name, group in groups.items()}
  tasks = {
    name: functools.partial(_improve, groups[name], search)
    for name in sorted(share(costs), key=lambda name: -costs[name])
  }
  threads.run_tasks(tasks, judge, max_threads=_MOST_THREADS)
  told = gather(
    {
      name: (reports[name]._asdict(), permutations[name].tolist())
      for name in tasks
    }
  )
  for name in groups.keys() - tasks.keys():
    report, permutation = told[name]
    permutations[name] = np.array(permutation, np.int32)
    finish(GroupReport(**report | {"children": tuple(report["children"])}))
  taken = {name: permutations[name] for name in sizes if reports[name].accepted}
  ordered = tuple(reports[name] for name in sizes)
  return _reorder(variables, axes, taken), taken, ordered


def _group(
  key: jax.Array, name: str, children: list[consumers.Reader], notes: list[str]
) -> _Group:
  """The group with random numbers of its own."""
  salt = np.uint32(zlib.crc32(name.encode()))
  seed, kmeans_key = _random_numbers(key, salt)
  return _Group(children, notes, np.asarray(seed), kmeans_key)


@jax.jit
def _random_numbers(
  key: jax.Array, salt: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The seed of a search and the key of its k-means; compiled once."""
  search_key, kmeans_key = jax.random.split(jax.random.fold_in(key, salt))
  return jax.random.bits(search_key, (4,), np.uint32), kmeans_key


def _effort(group: _Group) -> float:
  """Entries of the Gram matrices: what the time of a search grows with."""
  return sum(
    math.prod(child.weights.shape[1:]) ** 2 for child in group.children
  )


def _reorder(
  variables: PyTree,
  axes: channels.ChannelAxes,
  permutations: channels.Permutations,
) -> PyTree:
  """`apply_permutations` on the host, where there is nothing to compile."""
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


def _improve(group: _Group, search: Search) -> _Found:
  """The order that the search finds, beside the one that there is."""
  grams = [
    covariance.channel_gram(
      child.weights, slots=child.slots, relative_ridge=RELATIVE_RIDGE
    )
    for child in group.children
  ]
  before = objective.evaluate(grams, np.arange(len(grams[0].sums)))
  found = search(np.random.default_rng(group.seed), grams)
  after = objective.evaluate(grams, found.permutation)
  singular = _singular(group.children, grams, (before, after))
  return _Found(before, after, [*group.notes, *singular])


def _judge(
  name: str, group: _Group, found: _Found, kmeans_steps: int
) -> GroupReport:
  """Whether the order that was found is taken, and why."""
  before, after, notes = found
  accepted = after.log_det < before.log_det - objective.MIN_GAIN
  error_before = error_after = 0.0
  if accepted and kmeans_steps:
    error_before, error_after = (
      _kmeans_error(
        group.kmeans_key, group.children, order.permutation, kmeans_steps
      )
      for order in (before, after)
    )
    accepted = error_after < error_before
  if not accepted:
    notes = [*notes, "the order that was found is not better"]
  return GroupReport(
    name,
    tuple(child.path for child in group.children),
    len(after.permutation),
    before.log_det,
    after.log_det,
    error_before,
    error_after,
    accepted,
    "; ".join(notes),
  )


def _singular(
  children: list[consumers.Reader],
  grams: objective.Grams,
  compared: tuple[objective.Order, ...],
) -> list[str]:
  """Says which kernels owe a finite log-determinant to the ridge."""
  notes = []
  for index, (child, gram) in enumerate(zip(children, grams, strict=True)):
    least = min(
      np.linalg.eigvalsh(covariance.covariance(gram, order.sums[index]))[0]
      for order in compared
    )
    if least < 2 * gram.ridge:
      notes.append(
        f"{child.path} has a singular covariance (dead, constant or duplicate "
        "channels, or too few sub-vectors): regularized"
      )
  return notes


def _kmeans_error(
  key: jax.Array,
  children: list[consumers.Reader],
  permutation: np.ndarray,
  steps: int,
) -> float:
  """Relative squared error of k-means, averaged over the children's weights."""
  lost, size = 0.0, 0
  for child in children:
    ordered = child.weights[:, permutation]
    vectors = ordered.reshape(-1, child.slots * ordered.shape[2])
    result = kmeans.annealed_kmeans(
      key, jnp.asarray(vectors), num_codes=child.num_codes, num_steps=steps
    )
    error = float(result.distortion[-1]) / vectors.shape[1]
    # Not the variance: constant weights have none, and no error either.
    lost += error / float(np.mean(np.square(vectors))) * vectors.size
    size += vectors.size
  return lost / size

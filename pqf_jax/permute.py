"""Stage 1: reorders channels so that they quantize better."""

import functools
import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pqf_jax import kmeans
from pqf_jax.core import channels, spread, trees, vq_array
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


def permute_channels(
  key: jax.Array,
  variables: PyTree,
  axes: channels.ChannelAxes,
  plan: plans.CompressionPlan,
  *,
  search: Search = permutation_search.search_permutation,
  kmeans_steps: int = 0,
  donate: bool = False,
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
      by default: for ResNet-18 on one H200, 20 steps, run for one group after
      another, added 12 % to the stage and 7 s of compilation, and agreed with
      the log-determinant in all 12 groups.
    donate: whether leaves that are spread over devices may be deleted where
      they get a new order, which saves their memory.
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
  vq_array.check_dense(variables)
  sizes = channels.group_sizes(variables, axes)
  consumers_of = consumers.find_consumers(variables, axes, plan)
  permutations: dict[str, np.ndarray] = {}
  reports: dict[str, GroupReport] = {}

  def finish(name: str, result: tuple[GroupReport, np.ndarray]) -> None:
    reports[name], permutations[name] = result
    on_group(reports[name])

  costs = {}
  for name, size in sizes.items():
    usable, notes = consumers_of.get(name, ([], []))
    if usable:
      costs[name] = _effort(usable)
    else:
      note = "; ".join(notes) or "no compressed kernel reads it"
      report = GroupReport(name, (), size, 0.0, 0.0, 0.0, 0.0, False, note)
      finish(name, (report, np.arange(size)))
  tasks = {}
  for name in sorted(share(costs), key=lambda name: -costs[name]):
    salt = np.uint32(zlib.crc32(name.encode()))
    numbers = _random_numbers(key, salt)
    tasks[name] = functools.partial(
      _search_group, name, *consumers_of[name], numbers, search, kmeans_steps
    )
  threads.run_tasks(tasks, finish, max_threads=_MOST_THREADS)
  gathered = gather(
    {
      name: (reports[name]._asdict(), permutations[name].tolist())
      for name in tasks
    }
  )
  for name in costs.keys() - tasks.keys():
    report, permutation = gathered[name]
    report = GroupReport(**report | {"consumers": tuple(report["consumers"])})
    finish(name, (report, np.array(permutation, np.int32)))
  accepted = {
    name: permutations[name] for name in sizes if reports[name].accepted
  }
  ordered = tuple(reports[name] for name in sizes)
  moved = _reorder(variables, axes, accepted, donate)
  return moved, accepted, ordered


@jax.jit
def _random_numbers(
  key: jax.Array, salt: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the seed of a search and the key of its k-means; compiled once."""
  search_key, kmeans_key = jax.random.split(jax.random.fold_in(key, salt))
  return jax.random.bits(search_key, (4,), np.uint32), kmeans_key


def _effort(usable: list[consumers.Consumer]) -> float:
  """Returns the entries of the Gram matrices; the time grows with them."""
  shapes = [consumer.shape for consumer in usable]
  return sum((size * taps) ** 2 for _, size, taps in shapes)


def _reorder(
  variables: PyTree,
  axes: channels.ChannelAxes,
  permutations: channels.Permutations,
  donate: bool,
) -> PyTree:
  """Applies the permutations where each leaf is, if it is spread.

  Other leaves are reordered on the host, where nothing is compiled: one at a
  time is there, and returns to where it was.
  """
  flat = trees.flatten(variables)
  moved = {}
  for path, row in axes.items():
    leaf = flat[path]
    groups = channels.group_sizes({path: leaf}, {path: row})
    place = getattr(leaf, "sharding", None)
    own = {name: permutations[name] for name in groups & permutations.keys()}
    if own:
      one = {path: leaf if spread.is_spread(leaf) else jax.device_get(leaf)}
      leaf = channels.apply_permutations(one, {path: row}, own, donate=donate)[
        path
      ]
    moved[path] = jax.device_put(leaf, place)
  return trees.replace(variables, moved)


def _search_group(
  name: str,
  usable: list[consumers.Consumer],
  notes: list[str],
  numbers: tuple[jax.Array, jax.Array],
  search: Search,
  kmeans_steps: int,
) -> tuple[GroupReport, np.ndarray]:
  """Searches an order for one group, and decides whether it is applied."""
  grams = [
    covariance.channel_gram(
      consumer.weights, slots=consumer.slots, relative_ridge=RELATIVE_RIDGE
    )
    for consumer in usable
  ]
  seed, kmeans_key = numbers
  before = objective.evaluate(grams, np.arange(len(grams[0].sums)))
  best = search(np.random.default_rng(np.asarray(seed)), grams)
  after = objective.evaluate(grams, best.permutation)
  notes = [*notes, *_singular(usable, grams, (before, after))]
  accepted = after.log_det < before.log_det - objective.MIN_GAIN
  error_before = error_after = 0.0
  if accepted and kmeans_steps:
    error_before, error_after = (
      _kmeans_error(kmeans_key, usable, order.permutation, kmeans_steps)
      for order in (before, after)
    )
    accepted = error_after < error_before
  if not accepted:
    notes.append("the new order is not better")
  report = GroupReport(
    name,
    tuple(dict.fromkeys(consumer.path for consumer in usable)),
    len(after.permutation),
    before.log_det,
    after.log_det,
    error_before,
    error_after,
    accepted,
    "; ".join(notes),
  )
  return report, after.permutation.astype(np.int32)


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

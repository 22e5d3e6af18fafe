"""Which boxes a detector is trained on, and which object each should find.

Static shapes: objects are padded to G rows, and samples to a fixed number, both
with masks. Decisions are torchvision's.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pqf_jax.models.mask_rcnn import boxes as box_ops


class Matches(NamedTuple):
  """What N candidates are matched to.

  Attributes:
    object: int32 [N], index of the object; of the nearest one where none is
      matched.
    positive: bool [N], matched.
    negative: bool [N], background. What is neither is not trained on.
  """

  object: jax.Array
  positive: jax.Array
  negative: jax.Array


class Samples(NamedTuple):
  """The candidates to train on, positive ones first.

  Attributes:
    index: int32 [num], among the candidates; any number where not valid.
    positive: bool [num].
    valid: bool [num], positive or negative.
  """

  index: jax.Array
  positive: jax.Array
  valid: jax.Array


def match(
  objects: jax.Array,
  exists: jax.Array,
  candidates: jax.Array,
  *,
  low: float,
  high: float,
  best_too: bool,
) -> Matches:
  """Matches candidates to the object that they overlap most.

  Args:
    objects: boxes [G, 4].
    exists: bool [G], which rows are objects.
    candidates: boxes [N, 4].
    low: overlap (intersection over union) below which it is background.
    high: overlap from which on it is matched.
    best_too: also match, to its own best object, each candidate that overlaps
      any object as much as none does more, ties included.
  """
  overlap = box_ops.iou_matrix(objects, candidates)
  # Padding overlaps nothing, not even by 0.
  overlap = jnp.where(exists[:, None], overlap, -1)
  # The equality below needs the very numbers that the maximum was taken of.
  overlap = lax.optimization_barrier(overlap)
  best = overlap.max(axis=0)
  positive = best >= high
  if best_too:
    of_object = overlap.max(axis=1, keepdims=True)
    ties = (overlap == of_object) & exists[:, None]
    positive = positive | ties.any(axis=0)
  return Matches(
    overlap.argmax(axis=0).astype(jnp.int32),
    positive,
    (best < low) & ~positive,
  )


def draw_priorities(key: jax.Array, count: int) -> jax.Array:
  """Uniform numbers [count]; the least are sampled. `key` is consumed."""
  return jax.random.uniform(key, (count,), jnp.float32)


def sample(
  matches: Matches,
  priorities: jax.Array,
  *,
  num_samples: int,
  max_positive: int,
) -> Samples:
  """Picks candidates without replacement, those of least priority.

  As many positive ones as there are, at most `max_positive`; then negative
  ones, as many as there are, up to `num_samples` in all.
  """

  def pick(mask: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    count = min(count, mask.shape[0])
    order = jnp.where(mask, -priorities, -jnp.inf)
    _, index = lax.top_k(order, count)
    return index, jnp.minimum(mask.sum(), count)

  positive, num_positive = pick(matches.positive, max_positive)
  negative, num_negative = pick(matches.negative, num_samples)
  slot = jnp.arange(num_samples)
  is_positive = slot < num_positive
  index = jnp.where(
    is_positive,
    positive[jnp.minimum(slot, positive.shape[0] - 1)],
    negative[jnp.clip(slot - num_positive, 0, negative.shape[0] - 1)],
  )
  return Samples(index, is_positive, slot < num_positive + num_negative)


def match_and_sample(
  key: jax.Array,
  objects: jax.Array,
  exists: jax.Array,
  candidates: jax.Array,
  usable: jax.Array,
  *,
  low: float,
  high: float,
  best_too: bool,
  num_samples: int,
  max_positive: int,
) -> tuple[Samples, jax.Array]:
  """Draws the candidates to train on, and says which object each should find.

  Args:
    key: consumed.
    objects: boxes [G, 4].
    exists: bool [G], which rows are objects.
    candidates: boxes [N, 4].
    usable: bool [N], which rows are candidates.
    low: see `match`.
    high: see `match`.
    best_too: see `match`.
    num_samples: see `sample`.
    max_positive: see `sample`.

  Returns:
    (samples, int32 [num_samples] the object of each).
  """
  matches = match(
    objects, exists, candidates, low=low, high=high, best_too=best_too
  )
  matches = matches._replace(
    positive=matches.positive & usable, negative=matches.negative & usable
  )
  samples = sample(
    matches,
    draw_priorities(key, len(candidates)),
    num_samples=num_samples,
    max_positive=max_positive,
  )
  return samples, matches.object[samples.index]

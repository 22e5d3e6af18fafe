"""Assignment of objects to candidate boxes, and sampling of boxes to train on.

Shapes are static: objects are padded to G rows and samples to a fixed number,
both with masks. Decisions are torchvision's.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pqf_jax.models.mask_rcnn import boxes as box_ops


class Matches(NamedTuple):
  """Objects that N candidates are matched to.

  Attributes:
    object_index: int32 [N], index of the object that overlaps most, matched or
      not.
    positive: bool [N], matched.
    negative: bool [N], background. Candidates that are neither are not trained
      on.
  """

  object_index: jax.Array
  positive: jax.Array
  negative: jax.Array


class Samples(NamedTuple):
  """The candidates to train on, positive ones first.

  Attributes:
    indices: int32 [num], among the candidates; any number where not valid.
    positive: bool [num].
    valid: bool [num], positive or negative.
  """

  indices: jax.Array
  positive: jax.Array
  valid: jax.Array


def match(
  objects: jax.Array,
  exists: jax.Array,
  candidates: jax.Array,
  usable: jax.Array,
  *,
  low: float,
  high: float,
  allow_low_quality: bool,
) -> Matches:
  """Matches candidates to the object that they overlap most.

  Args:
    objects: boxes [G, 4].
    exists: bool [G], which rows are objects.
    candidates: boxes [N, 4].
    usable: bool [N], which rows are candidates.
    low: overlap (intersection over union) below which a candidate is
      background.
    high: least overlap at which a candidate is matched.
    allow_low_quality: also match the candidates that overlap some object most,
      ties included, each to the object that it overlaps most itself.
  """
  overlap = box_ops.iou_matrix(objects, candidates)
  # Padding overlaps nothing, not even by 0.
  overlap = jnp.where(exists[:, None], overlap, -1)
  # The equality below needs the very numbers that `max` has read.
  overlap = lax.optimization_barrier(overlap)
  best = overlap.max(axis=0)
  positive = best >= high
  if allow_low_quality:
    best_of_object = overlap.max(axis=1, keepdims=True)
    ties = (overlap == best_of_object) & exists[:, None]
    positive = positive | ties.any(axis=0)
  negative = (best < low) & ~positive
  object_index = overlap.argmax(axis=0).astype(jnp.int32)
  return Matches(object_index, positive & usable, negative & usable)


def draw_priorities(key: jax.Array, count: int) -> jax.Array:
  """Draws uniform numbers [count]; the least are sampled. Consumes `key`."""
  return jax.random.uniform(key, (count,), jnp.float32)


def sample(
  matches: Matches,
  priorities: jax.Array,
  *,
  num_samples: int,
  max_positive: int,
) -> Samples:
  """Picks the candidates of least priority, without replacement.

  It takes all positive ones, at most `max_positive`, then negative ones up to
  `num_samples` in all.
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

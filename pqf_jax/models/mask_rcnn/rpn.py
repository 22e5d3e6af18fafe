"""Region proposal network (arXiv 1506.01497): boxes that may hold objects."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike

from pqf_jax.models.mask_rcnn import anchors, fpn, matching, nms
from pqf_jax.models.mask_rcnn import boxes as box_ops

NMS_THRESHOLD = 0.7
MIN_SIDE = 1e-3
NUM_SAMPLES = 256
MAX_POSITIVE = 128
MATCHED_FROM, BACKGROUND_BELOW = 0.7, 0.3


class AnchorPredictions(NamedTuple):
  """Predictions for the N anchors of one map.

  Attributes:
    logits: [B, N].
    offsets: [B, N, 4], see `boxes.decode`.
  """

  logits: jax.Array
  offsets: jax.Array


class Proposals(NamedTuple):
  """Proposed boxes, best first.

  Attributes:
    boxes: [K, 4] in pixels of the network's input.
    valid: bool [K], False for padding.
  """

  boxes: jax.Array
  valid: jax.Array


class AnchorSamples(NamedTuple):
  """Sampled anchors of an image with predictions and targets.

  Attributes:
    logits: [num].
    positive: bool [num], whether the anchor has an object.
    valid: bool [num], False for padding.
    offsets: [num, 4].
    targets: [num, 4], the true offsets where positive.
  """

  logits: jax.Array
  positive: jax.Array
  valid: jax.Array
  offsets: jax.Array
  targets: jax.Array


class Head(nn.Module):
  """Three convolutions that all maps share."""

  num_anchors: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, maps: list[jax.Array]) -> list[AnchorPredictions]:
    """Maps [B, H, W, C] to predictions for H * W * num_anchors anchors each."""
    layer = functools.partial(fpn.convolution, dtype=self.dtype)
    conv = layer(3, maps[0].shape[-1], name="conv")
    classify = layer(1, self.num_anchors, name="cls_logits")
    regress = layer(1, 4 * self.num_anchors, name="bbox_pred")
    predictions = []
    for x in maps:
      hidden = nn.relu(conv(x))
      logits = classify(hidden).reshape(len(x), -1)
      offsets = regress(hidden).reshape(len(x), -1, 4)
      predictions.append(AnchorPredictions(logits, offsets))
    return predictions


class RegionProposal(nn.Module):
  """Wraps the head, so that it has torchvision's name."""

  num_anchors: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, maps: list[jax.Array]) -> list[AnchorPredictions]:
    """Applies the head; see `Head`."""
    return Head(self.num_anchors, self.dtype, name="head")(maps)


def propose(
  predictions: list[AnchorPredictions],
  grids: list[anchors.AnchorGrid],
  scaled: jax.Array,
  *,
  num_proposals: int,
) -> Proposals:
  """Proposes the best boxes of one image.

  It takes the best `num_proposals` of every map, drops those that overlap
  better ones of the same map by more than 0.7, then takes the best of all maps.

  Args:
    predictions: of each map, without the batch axis.
    grids: anchors of each map.
    scaled: int [2], height and width of the image within the network's input.
    num_proposals: K.
  """
  best = [
    _best_of_map(prediction, grid, scaled, num_proposals)
    for prediction, grid in zip(predictions, grids, strict=True)
  ]
  logits, boxes, valid = (jnp.stack(part) for part in zip(*best, strict=True))
  suppress = functools.partial(nms.suppress, threshold=NMS_THRESHOLD)
  keep = jax.vmap(suppress)(boxes, valid)
  # Probabilities, not logits, so that saturated ones tie as in torchvision.
  scores = jnp.where(keep, nn.sigmoid(logits), -1).ravel()
  scores, index = lax.top_k(scores, num_proposals)
  return Proposals(boxes.reshape(-1, 4)[index], scores >= 0)


def _best_of_map(
  prediction: AnchorPredictions,
  grid: anchors.AnchorGrid,
  scaled: jax.Array,
  count: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns (logits [K], boxes [K, 4], valid [K]) of the best of one map."""
  logits = jnp.where(grid.exists, prediction.logits, -jnp.inf)
  logits, index = lax.top_k(logits, min(count, logits.size))
  boxes = box_ops.decode(prediction.offsets[index], grid.boxes[index])
  height, width = scaled.astype(boxes.dtype)
  boxes = box_ops.clip(boxes, height, width)
  valid = jnp.isfinite(logits) & box_ops.is_large(boxes, MIN_SIDE)
  rest = count - logits.size
  return (
    jnp.pad(logits, (0, rest)),
    jnp.pad(boxes, ((0, rest), (0, 0))),
    jnp.pad(valid, (0, rest)),
  )


def training_samples(
  key: jax.Array,
  predictions: list[AnchorPredictions],
  grids: list[anchors.AnchorGrid],
  objects: jax.Array,
  exists: jax.Array,
) -> AnchorSamples:
  """Samples anchors of one image with their targets.

  Args:
    key: consumed.
    predictions: of each map, without the batch axis.
    grids: anchors of each map.
    objects: boxes [G, 4] in pixels of the network's input.
    exists: bool [G].
  """
  boxes = jnp.concatenate([grid.boxes for grid in grids])
  inside = jnp.concatenate([grid.exists for grid in grids])
  matches = matching.match(
    objects,
    exists,
    boxes,
    inside,
    low=BACKGROUND_BELOW,
    high=MATCHED_FROM,
    allow_low_quality=True,
  )
  samples = matching.sample(
    matches,
    matching.draw_priorities(key, len(boxes)),
    num_samples=NUM_SAMPLES,
    max_positive=MAX_POSITIVE,
  )
  targets = objects[matches.object_index[samples.indices]]
  logits = jnp.concatenate([maps.logits for maps in predictions])
  offsets = jnp.concatenate([maps.offsets for maps in predictions])
  return AnchorSamples(
    logits[samples.indices],
    samples.positive,
    samples.valid,
    offsets[samples.indices],
    box_ops.encode(targets, boxes[samples.indices]),
  )

"""Region proposal network (arXiv 1506.01497): which boxes to look at."""

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


class Regions(NamedTuple):
  """What the network says about the N anchors of one map.

  Attributes:
    logits: [B, N].
    offsets: [B, N, 4], see `ops.boxes.decode`.
  """

  logits: jax.Array
  offsets: jax.Array


class Proposals(NamedTuple):
  """Boxes, best first.

  Attributes:
    boxes: [K, 4] in pixels of the network's input.
    valid: bool [K], those that exist.
  """

  boxes: jax.Array
  valid: jax.Array


class Training(NamedTuple):
  """Sampled anchors of an image.

  Attributes:
    logits: [num].
    positive: bool [num]: contains an object.
    valid: bool [num]: positive or background, not padding.
    offsets: [num, 4].
    targets: [num, 4], what they should be where positive.
  """

  logits: jax.Array
  positive: jax.Array
  valid: jax.Array
  offsets: jax.Array
  targets: jax.Array


class Head(nn.Module):
  """The same three convolutions for all maps."""

  num_anchors: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, maps: list[jax.Array]) -> list[Regions]:
    """[B, H, W, C] each -> regions of N = H * W * num_anchors each."""
    settings = {"dtype": self.dtype}
    features = maps[0].shape[-1]
    conv = fpn.convolution(3, features, name="conv", **settings)
    logits = fpn.convolution(1, self.num_anchors, name="cls_logits", **settings)
    offsets = fpn.convolution(
      1, 4 * self.num_anchors, name="bbox_pred", **settings
    )
    found = []
    for x in maps:
      hidden = nn.relu(conv(x))
      found.append(
        Regions(
          logits(hidden).reshape(len(x), -1),
          offsets(hidden).reshape(len(x), -1, 4),
        )
      )
    return found


class RegionProposal(nn.Module):
  """The head under torchvision's name."""

  num_anchors: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, maps: list[jax.Array]) -> list[Regions]:
    """See `Head`."""
    return Head(self.num_anchors, self.dtype, name="head")(maps)


def propose(
  regions: list[Regions],
  grids: list[anchors.Grid],
  scaled: jax.Array,
  *,
  num_proposals: int,
) -> Proposals:
  """The best boxes of one image.

  Of every map the best `num_proposals`, of which those that overlap better ones
  of the same map by more than 0.7 are dropped; then the best of all maps.

  Args:
    regions: of each map, without the batch axis.
    grids: anchors of each map.
    scaled: int [2], height and width of the image within the network's input.
    num_proposals: K.
  """
  found = [
    _best_of_map(region, grid, scaled, num_proposals)
    for region, grid in zip(regions, grids, strict=True)
  ]
  logits, boxes, valid = (jnp.stack(part) for part in zip(*found, strict=True))
  keep = jax.vmap(
    lambda boxes, valid: nms.suppress(boxes, valid, threshold=NMS_THRESHOLD)
  )(boxes, valid)
  # By probability, not logit, so that ties of saturated ones are torchvision's.
  scores = jnp.where(keep, nn.sigmoid(logits), -1).ravel()
  scores, index = lax.top_k(scores, num_proposals)
  return Proposals(boxes.reshape(-1, 4)[index], scores >= 0)


def _best_of_map(
  region: Regions, grid: anchors.Grid, scaled: jax.Array, count: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(logits [K], boxes [K, 4], valid [K]) of the best of one map."""
  logits = jnp.where(grid.exists, region.logits, -jnp.inf)
  logits, index = lax.top_k(logits, min(count, logits.size))
  boxes = box_ops.decode(region.offsets[index], grid.boxes[index])
  height, width = scaled.astype(boxes.dtype)
  boxes = box_ops.clip(boxes, height, width)
  valid = jnp.isfinite(logits) & box_ops.has_sides(boxes, MIN_SIDE)
  rest = count - logits.size
  return (
    jnp.pad(logits, (0, rest)),
    jnp.pad(boxes, ((0, rest), (0, 0))),
    jnp.pad(valid, (0, rest)),
  )


def training_samples(
  key: jax.Array,
  regions: list[Regions],
  grids: list[anchors.Grid],
  objects: jax.Array,
  exists: jax.Array,
) -> Training:
  """Samples anchors of one image and says what they should have found.

  Args:
    key: consumed.
    regions: of each map, without the batch axis.
    grids: anchors of each map.
    objects: boxes [G, 4] in pixels of the network's input.
    exists: bool [G].
  """
  boxes = jnp.concatenate([grid.boxes for grid in grids])
  inside = jnp.concatenate([grid.exists for grid in grids])
  samples, matched = matching.match_and_sample(
    key,
    objects,
    exists,
    boxes,
    inside,
    low=BACKGROUND_BELOW,
    high=MATCHED_FROM,
    best_too=True,
    num_samples=NUM_SAMPLES,
    max_positive=MAX_POSITIVE,
  )
  logits = jnp.concatenate([region.logits for region in regions])
  offsets = jnp.concatenate([region.offsets for region in regions])
  return Training(
    logits[samples.index],
    samples.positive,
    samples.valid,
    offsets[samples.index],
    box_ops.encode(objects[matched], boxes[samples.index]),
  )

"""The parts of Mask R-CNN (arXiv 1703.06870) put together.

    images -> scaled -> backbone -> rpn -> boxes to look at -> roi_heads

All shapes are static: images of any size lie in buffers of one, and what is
found is padded, with masks.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike

from pqf_jax.models import layers
from pqf_jax.models.mask_rcnn import anchors, fpn, resize, roi_heads, rpn
from pqf_jax.models.mask_rcnn import masks as mask_ops
from pqf_jax.models.mask_rcnn import roi_align as roi_ops

PyTree = Any
Batch = Mapping[str, jax.Array]
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
FEATURES = 256
BOX_FEATURES = 1024


class Detections(NamedTuple):
  """What was found, best first; zeros where `valid` is False.

  Attributes:
    boxes: [B, K, 4] (x1, y1, x2, y2) in pixels of the original images.
    scores: [B, K].
    labels: int32 [B, K], from 1.
    masks: [B, K, 28, 28] probabilities; `ops.masks.paste_masks` puts them into
      the image.
    valid: bool [B, K].
  """

  boxes: jax.Array
  scores: jax.Array
  labels: jax.Array
  masks: jax.Array
  valid: jax.Array


class TrainingOutputs(NamedTuple):
  """What the losses are computed of: predictions for sampled boxes, and truth.

  N anchors, R boxes and M masks an image. `valid` tells samples from padding.

  Attributes:
    anchors: predictions [B, N] for anchors, and their targets.
    boxes: the sampled boxes [B, R], their labels and targets.
    class_logits: [B, R, num_classes].
    box_offsets: [B, R, 4], of the box's label.
    mask_logits: [B, M, 28, 28] of the first M boxes, of the box's label.
    mask_targets: [B, M, 28, 28], from 0 to 1.
    mask_valid: bool [B, M].
  """

  anchors: rpn.Training
  boxes: roi_heads.Samples
  class_logits: jax.Array
  box_offsets: jax.Array
  mask_logits: jax.Array
  mask_targets: jax.Array
  mask_valid: jax.Array


class _Seen(NamedTuple):
  """What both inference and training start from, of B images.

  Attributes:
    scaled: int [B, 2], sizes within the canvas.
    padded: the same rounded up to multiples of 32.
    maps: the pyramid.
    regions: of the finest map to the coarsest.
    grids: their anchors.
  """

  scaled: jax.Array
  padded: jax.Array
  maps: list[jax.Array]
  regions: list[rpn.Regions]
  grids: list[anchors.Grid]


class MaskRCNN(nn.Module):
  """The network; `mask_rcnn.make` says what the settings are.

  `apply(variables, images, sizes)` finds objects, `apply(variables, batch, key,
  method="training_outputs")` gives what the losses are computed of.
  """

  num_classes: int
  min_size: int
  max_size: int
  canvas: tuple[int, int]
  depth: int
  norm_epsilon: float
  first_dense: str
  anchor_sizes: tuple[tuple[int, ...], ...]
  anchor_ratios: tuple[float, ...]
  num_proposals: int
  num_training_proposals: int
  num_detections: int
  score_threshold: float
  dtype: DTypeLike

  def setup(self) -> None:
    """Makes the three parts, under torchvision's names."""
    num_anchors = len(self.anchor_ratios) * len(self.anchor_sizes[0])
    self.backbone = fpn.Backbone(
      self.depth, FEATURES, self.norm_epsilon, self.dtype
    )
    self.rpn = rpn.RegionProposal(num_anchors, self.dtype)
    self.roi_heads = roi_heads.RoIHeads(
      self.num_classes, self.first_dense, BOX_FEATURES, FEATURES, self.dtype
    )

  def __call__(self, images: jax.Array, sizes: jax.Array) -> Detections:
    """Finds objects.

    Args:
      images: uint8 [B, S, T, 3], each in the top left of its buffer.
      sizes: int32 [B, 2], their heights and widths.
    """
    seen = self._look(images, sizes)

    def propose(*of_image: Any) -> rpn.Proposals:
      return rpn.propose(*of_image, num_proposals=self.num_proposals)

    proposals = jax.vmap(propose)(seen.regions, seen.grids, seen.scaled)
    logits, offsets = self._classify(seen, proposals.boxes)

    def pick(*of_image: jax.Array) -> roi_heads.Picked:
      return roi_heads.pick(
        *of_image,
        score_threshold=self.score_threshold,
        num_detections=self.num_detections,
      )

    picked = jax.vmap(pick)(logits, offsets, *proposals, seen.scaled)
    masks = nn.sigmoid(self._segment(seen, picked.boxes, picked.labels))
    masks = jnp.where(picked.valid[:, :, None, None], masks, 0)
    ratio = _ratio(sizes, seen.scaled).astype(picked.boxes.dtype)
    return Detections(
      picked.boxes * ratio[:, None, :],
      picked.scores,
      picked.labels,
      masks,
      picked.valid,
    )

  def training_outputs(self, batch: Batch, key: jax.Array) -> TrainingOutputs:
    """Samples anchors and boxes, and predicts and looks up what they are.

    Args:
      batch: `image` and `size` as in `__call__`, and the objects, padded to G:
        `boxes` float32 [B, G, 4] in original pixels, `labels` int32 [B, G]
        from 1, `valid` bool [B, G], and `masks` uint8 [B, G, S, ceil(T / 8)]
        as `np.packbits(mask, axis=-1)` gives them.
      key: draws the samples; consumed.
    """
    seen = self._look(batch["image"], batch["size"])
    wide = seen.regions[0].logits.dtype
    ratio = _ratio(seen.scaled, batch["size"]).astype(wide)
    objects = batch["boxes"].astype(wide) * ratio[:, None, :]
    keys = jax.random.split(key, (len(objects), 2))
    anchor_samples = jax.vmap(rpn.training_samples)(
      keys[:, 0], seen.regions, seen.grids, objects, batch["valid"]
    )

    def propose(*of_image: Any) -> rpn.Proposals:
      return rpn.propose(*of_image, num_proposals=self.num_training_proposals)

    proposals = jax.vmap(propose)(
      lax.stop_gradient(seen.regions), seen.grids, seen.scaled
    )
    samples = jax.vmap(roi_heads.training_samples)(
      keys[:, 1], *proposals, objects, batch["labels"], batch["valid"]
    )
    logits, offsets = self._classify(seen, samples.boxes)
    index = samples.labels[:, :, None, None]
    first = jax.tree.map(lambda x: x[:, : roi_heads.MAX_POSITIVE], samples)

    def crop(*of_image: jax.Array) -> jax.Array:
      return mask_ops.crop_masks(
        *of_image,
        num_bins=2 * roi_heads.MASK_BINS,
        longest=max(self.canvas),
      )

    targets = jax.vmap(crop)(
      batch["masks"], first.objects, first.boxes, batch["size"], seen.scaled
    )
    return TrainingOutputs(
      anchor_samples,
      samples,
      logits,
      jnp.take_along_axis(offsets, index, axis=2)[:, :, 0],
      self._segment(seen, first.boxes, first.labels),
      targets,
      first.positive,
    )

  def _look(self, images: jax.Array, sizes: jax.Array) -> _Seen:
    wide = layers.at_least_float32(self.dtype)
    longest = max(images.shape[1:3])
    scaled = resize.scaled_sizes(sizes, longest, self.min_size, self.max_size)
    x = _normalize(images, wide)

    def scale(*of_image: jax.Array) -> jax.Array:
      return resize.resize_image(*of_image, canvas=self.canvas)

    x = jax.vmap(scale)(x, sizes, scaled).astype(self.dtype)
    padded = fpn.padded(scaled)
    maps = self.backbone(x, fpn.Region(padded, self.canvas))
    regions = jax.tree.map(lambda part: part.astype(wide), self.rpn(maps))
    grids = [
      self._anchors(sizes_of_anchors, x.shape[1:3], grid, padded, wide)
      for sizes_of_anchors, x, grid in zip(
        self.anchor_sizes, maps, fpn.grid_sizes(padded, len(maps)), strict=True
      )
    ]
    return _Seen(scaled, padded, maps, regions, grids)

  def _anchors(
    self,
    sizes: Sequence[int],
    shape: tuple[int, int],
    grid: jax.Array,
    padded: jax.Array,
    dtype: np.dtype,
  ) -> anchors.Grid:
    base = anchors.base_anchors(sizes, self.anchor_ratios)
    return jax.vmap(
      lambda grid, size: anchors.anchor_grid(
        base, shape, grid, size, dtype=dtype
      )
    )(grid, padded)

  def _pool(self, seen: _Seen, boxes: jax.Array, num_bins: int) -> jax.Array:
    """[B, R, 4] -> [B * R, P, P, C]; the coarsest map is not used."""

    def pool(*of_image: Any) -> jax.Array:
      return roi_ops.roi_align(*of_image, num_bins=num_bins)

    pooled = jax.vmap(pool)(seen.maps[:-1], boxes, seen.padded)
    return pooled.reshape(-1, *pooled.shape[2:])

  def _classify(
    self, seen: _Seen, boxes: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """[B, R, 4] -> logits [B, R, C], offsets [B, R, C, 4]."""
    found = self.roi_heads.classify(self._pool(seen, boxes, roi_heads.BOX_BINS))
    return tuple(
      part.astype(boxes.dtype).reshape(*boxes.shape[:2], *part.shape[1:])
      for part in found
    )

  def _segment(
    self, seen: _Seen, boxes: jax.Array, labels: jax.Array
  ) -> jax.Array:
    """[B, R, 4], int [B, R] -> logits [B, R, 28, 28]."""
    pooled = self._pool(seen, boxes, roi_heads.MASK_BINS)
    logits = self.roi_heads.segment(pooled, labels.ravel())
    logits = logits.astype(boxes.dtype)
    return logits.reshape(*boxes.shape[:2], *logits.shape[1:])


def _normalize(images: jax.Array, dtype: np.dtype) -> jax.Array:
  """[B, S, T, 3] of 0 to 255 -> as the body was trained with."""
  mean, std = (
    jnp.asarray(values, dtype).reshape(1, 1, 1, -1)
    for values in (IMAGE_MEAN, IMAGE_STD)
  )
  return (images.astype(dtype) / 255 - mean) / std


def _ratio(sizes: jax.Array, others: jax.Array) -> jax.Array:
  """(x, y, x, y) factors float32 [B, 4] from sizes [B, 2] to others."""
  ratio = sizes.astype(jnp.float32) / others.astype(jnp.float32)
  return jnp.concatenate([ratio[:, ::-1], ratio[:, ::-1]], axis=1)

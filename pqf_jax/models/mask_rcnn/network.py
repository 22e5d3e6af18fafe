"""Mask R-CNN with ResNet-FPN (arXiv 1703.06870), equal to torchvision's.

    images -> scaled -> backbone -> rpn -> proposed boxes -> roi_heads

All shapes are static: images of any size lie in buffers of one size, and
results are padded and have masks.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike

from pqf_jax import errors
from pqf_jax.models import layers, resnet
from pqf_jax.models.mask_rcnn import anchors, fpn, resize, roi_heads, rpn
from pqf_jax.models.mask_rcnn import masks as mask_ops
from pqf_jax.models.mask_rcnn import roi_align as roi_ops

PyTree = Any
Batch = Mapping[str, jax.Array]
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
FEATURES = 256
BOX_FEATURES = 1024
ANCHOR_SIZES = ((32,), (64,), (128,), (256,), (512,))
ANCHOR_RATIOS = (0.5, 1.0, 2.0)
MOST = 2**14  # sides in pixels, and boxes of an image
# {order of the rows of the first dense layer: name of the layer}.
FC6_LAYOUTS = {"chw": "fc6", "hwc": "fc6_hwc"}


class Detections(NamedTuple):
  """Detected objects, best first; zeros where `valid` is False.

  Attributes:
    boxes: [B, K, 4] (x1, y1, x2, y2) in pixels of the original images.
    scores: [B, K]; NaN throughout an image for which the network's outputs are
      not finite, so that what it found there means nothing.
    labels: int32 [B, K], from 1.
    masks: [B, K, 28, 28] probabilities; `masks.paste_masks` puts them into the
      image.
    valid: bool [B, K].
  """

  boxes: jax.Array
  scores: jax.Array
  labels: jax.Array
  masks: jax.Array
  valid: jax.Array


class TrainingOutputs(NamedTuple):
  """Predictions for sampled boxes and their targets, as the losses need them.

  An image has N anchors, R boxes and M masks; `valid` separates samples from
  padding.

  Attributes:
    anchors: predictions [B, N] for anchors, and their targets.
    boxes: the sampled boxes [B, R], their labels and targets.
    class_logits: [B, R, num_classes].
    box_offsets: [B, R, 4], of the box's label.
    mask_logits: [B, M, 28, 28] of the first M boxes, of the box's label.
    mask_targets: [B, M, 28, 28], from 0 to 1.
    mask_valid: bool [B, M].
  """

  anchors: rpn.AnchorSamples
  boxes: roi_heads.BoxSamples
  class_logits: jax.Array
  box_offsets: jax.Array
  mask_logits: jax.Array
  mask_targets: jax.Array
  mask_valid: jax.Array


class Places(NamedTuple):
  """Boxes that a network looks at, those that surely hold an object first.

  Attributes:
    boxes: [B, R, 4] in pixels of the network's input.
    labels: int32 [B, R], the likeliest that is not background.
    valid: bool [B, R].
  """

  boxes: jax.Array
  labels: jax.Array
  valid: jax.Array


class RawOutputs(NamedTuple):
  """What the network says of all N anchors, R boxes and the first M of them.

  Attributes:
    exists: bool [B, N], whether the image covers the anchor.
    anchor_logits: [B, N].
    anchor_offsets: [B, N, 4].
    class_logits: [B, R, num_classes].
    box_offsets: [B, R, 4], of the box's label.
    mask_logits: [B, M, 28, 28], of the box's label.
  """

  exists: jax.Array
  anchor_logits: jax.Array
  anchor_offsets: jax.Array
  class_logits: jax.Array
  box_offsets: jax.Array
  mask_logits: jax.Array


class _Features(NamedTuple):
  """Feature maps and anchors of B images, for inference and for training.

  Attributes:
    scaled: int [B, 2], sizes within the canvas.
    padded: the same rounded up to multiples of 32.
    maps: the pyramid.
    predictions: of the region proposal network, from the finest map to the
      coarsest.
    grids: the anchors of each map.
  """

  scaled: jax.Array
  padded: jax.Array
  maps: list[jax.Array]
  predictions: list[rpn.AnchorPredictions]
  grids: list[anchors.AnchorGrid]


class MaskRCNN(nn.Module):
  """The network; `make` describes the settings.

  `apply(variables, images, sizes)` detects objects; `apply(variables, batch,
  key, method="training_outputs")` computes what the losses need. Two networks
  are compared by their `raw_outputs` at the `find_places` of one of them.
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
    """Creates the three parts under torchvision's names."""
    num_anchors = len(self.anchor_ratios) * len(self.anchor_sizes[0])
    self.backbone = fpn.Backbone(
      self.depth, FEATURES, self.norm_epsilon, self.dtype
    )
    self.rpn = rpn.RegionProposal(num_anchors, self.dtype)
    self.roi_heads = roi_heads.RoIHeads(
      self.num_classes, self.first_dense, BOX_FEATURES, FEATURES, self.dtype
    )

  def __call__(self, images: jax.Array, sizes: jax.Array) -> Detections:
    """Detects objects.

    Args:
      images: uint8 [B, S, T, 3], each in the top left of its buffer.
      sizes: int32 [B, 2], their heights and widths.
    """
    features = self._extract(images, sizes)
    propose = functools.partial(rpn.propose, num_proposals=self.num_proposals)
    proposals = jax.vmap(propose)(
      features.predictions, features.grids, features.scaled
    )
    logits, offsets = self._classify(features, proposals.boxes)
    select = functools.partial(
      roi_heads.select_detections,
      score_threshold=self.score_threshold,
      num_detections=self.num_detections,
    )
    boxes, scores, labels, valid = jax.vmap(select)(
      logits, offsets, *proposals, features.scaled
    )
    mask_logits = self._segment(features, boxes, labels)
    masks = jnp.where(valid[:, :, None, None], nn.sigmoid(mask_logits), 0)
    outputs = (features.predictions, logits, offsets, mask_logits)
    scores = jnp.where(_are_finite(outputs)[:, None], scores, jnp.nan)
    ratio = _ratio(sizes, features.scaled).astype(boxes.dtype)
    return Detections(boxes * ratio[:, None, :], scores, labels, masks, valid)

  def training_outputs(self, batch: Batch, key: jax.Array) -> TrainingOutputs:
    """Samples anchors and boxes and computes predictions and targets for them.

    Args:
      batch: `image` and `size` as in `__call__`, and the objects, padded to G:
        `boxes` float32 [B, G, 4] in original pixels, `labels` int32 [B, G]
        from 1, `valid` bool [B, G], and `masks` uint8 [B, G, S, ceil(T / 8)]
        as returned by `np.packbits(mask, axis=-1)`.
      key: draws the samples; consumed.
    """
    features = self._extract(batch["image"], batch["size"])
    wide = features.predictions[0].logits.dtype
    ratio = _ratio(features.scaled, batch["size"]).astype(wide)
    objects = batch["boxes"].astype(wide) * ratio[:, None, :]
    keys = jax.random.split(key, (len(objects), 2))
    anchor_samples = jax.vmap(rpn.training_samples)(
      keys[:, 0], features.predictions, features.grids, objects, batch["valid"]
    )
    propose = functools.partial(
      rpn.propose, num_proposals=self.num_training_proposals
    )
    proposals = jax.vmap(propose)(
      lax.stop_gradient(features.predictions), features.grids, features.scaled
    )
    samples = jax.vmap(roi_heads.training_samples)(
      keys[:, 1], *proposals, objects, batch["labels"], batch["valid"]
    )
    logits, offsets = self._classify(features, samples.boxes)
    index = samples.labels[:, :, None, None]
    first = jax.tree.map(lambda x: x[:, : roi_heads.MAX_POSITIVE], samples)
    crop = functools.partial(
      mask_ops.crop_masks,
      num_bins=2 * roi_heads.MASK_BINS,
      longest=max(self.canvas),
    )
    targets = jax.vmap(crop)(
      batch["masks"],
      first.object_index,
      first.boxes,
      batch["size"],
      features.scaled,
    )
    return TrainingOutputs(
      anchor_samples,
      samples,
      logits,
      jnp.take_along_axis(offsets, index, axis=2)[:, :, 0],
      self._segment(features, first.boxes, first.labels),
      targets,
      first.positive,
    )

  def find_places(self, images: jax.Array, sizes: jax.Array) -> Places:
    """Returns the boxes that the region proposal network likes best."""
    features = self._extract(images, sizes)
    propose = functools.partial(
      rpn.propose, num_proposals=roi_heads.NUM_SAMPLES
    )
    proposals = jax.vmap(propose)(
      features.predictions, features.grids, features.scaled
    )
    logits, _ = self._classify(features, proposals.boxes)
    scores = nn.softmax(logits)[:, :, 1:].max(2)
    order = jnp.argsort(jnp.where(proposals.valid, -scores, 1), axis=1)
    labels = logits[:, :, 1:].argmax(2).astype(jnp.int32) + 1
    return Places(
      jnp.take_along_axis(proposals.boxes, order[:, :, None], axis=1),
      jnp.take_along_axis(labels, order, axis=1),
      jnp.take_along_axis(proposals.valid, order, axis=1),
    )

  def raw_outputs(
    self, images: jax.Array, sizes: jax.Array, places: Places
  ) -> RawOutputs:
    """Returns the outputs at given places, from which nothing is chosen."""
    features = self._extract(images, sizes)
    logits, offsets = self._classify(features, places.boxes)
    index = places.labels[:, :, None, None]
    first = jax.tree.map(lambda x: x[:, : roi_heads.MAX_POSITIVE], places)
    predictions = features.predictions
    return RawOutputs(
      jnp.concatenate([grid.exists for grid in features.grids], 1),
      jnp.concatenate([of_map.logits for of_map in predictions], 1),
      jnp.concatenate([of_map.offsets for of_map in predictions], 1),
      logits,
      jnp.take_along_axis(offsets, index, axis=2)[:, :, 0],
      self._segment(features, first.boxes, first.labels),
    )

  def _extract(self, images: jax.Array, sizes: jax.Array) -> _Features:
    wide = layers.at_least_float32(self.dtype)
    longest = max(images.shape[1:3])
    scaled = resize.scaled_sizes(sizes, longest, self.min_size, self.max_size)
    scale = functools.partial(resize.resize_image, canvas=self.canvas)
    x = jax.vmap(scale)(_normalize(images, wide), sizes, scaled)
    x = x.astype(self.dtype)
    padded = fpn.round_up(scaled)
    maps = self.backbone(x, fpn.ImageArea(padded, self.canvas))
    predictions = jax.tree.map(lambda part: part.astype(wide), self.rpn(maps))
    grids = []
    for i, (x, lengths) in enumerate(zip(maps, self.anchor_sizes, strict=True)):
      base = anchors.base_anchors(lengths, self.anchor_ratios)
      place = functools.partial(
        anchors.anchor_grid, base, x.shape[1:3], dtype=wide
      )
      stride = roi_ops.FIRST_STRIDE * 2**i
      grids.append(jax.vmap(place)((padded + stride - 1) // stride, padded))
    return _Features(scaled, padded, maps, predictions, grids)

  def _pool(
    self, features: _Features, boxes: jax.Array, num_bins: int
  ) -> jax.Array:
    """Maps boxes [B, R, 4] to [B * R, P, P, C] without the coarsest map."""
    pool = functools.partial(roi_ops.roi_align, num_bins=num_bins)
    pooled = jax.vmap(pool)(features.maps[:-1], boxes, features.padded)
    return pooled.reshape(-1, *pooled.shape[2:])

  def _classify(
    self, features: _Features, boxes: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Maps boxes [B, R, 4] to logits [B, R, C] and offsets [B, R, C, 4]."""
    pooled = self._pool(features, boxes, roi_heads.BOX_BINS)
    logits, offsets = self.roi_heads.classify(pooled)
    return _by_image(logits, boxes), _by_image(offsets, boxes)

  def _segment(
    self, features: _Features, boxes: jax.Array, labels: jax.Array
  ) -> jax.Array:
    """Maps boxes [B, R, 4], labels [B, R] to mask logits [B, R, 28, 28]."""
    pooled = self._pool(features, boxes, roi_heads.MASK_BINS)
    return _by_image(self.roi_heads.segment(pooled, labels.ravel()), boxes)


def make(
  *,
  num_classes: int,
  min_size: int = 800,
  max_size: int = 1333,
  canvas: tuple[int, int] | None = None,
  depth: int = 50,
  norm_epsilon: float = 0.0,
  fc6_layout: str = "chw",
  anchor_sizes: Sequence[Sequence[int]] = ANCHOR_SIZES,
  anchor_ratios: Sequence[float] = ANCHOR_RATIOS,
  num_proposals: int = 1000,
  num_training_proposals: int = 2000,
  num_detections: int = 100,
  score_threshold: float = 0.05,
  dtype: DTypeLike = jnp.float32,
) -> MaskRCNN:
  """Builds the network.

  Args:
    num_classes: with background, which is class 0: 91 for COCO.
    min_size: length that the short side of images is scaled to.
    max_size: bound of the long side.
    canvas: height and width of the network's input, multiples of 32. None: the
      square that every scaled image fits into. If all images of a batch have
      their long side in the same direction, (min_size, max_size) rounded up to
      multiples of 32 is enough and takes 60 % of the time; pixels beyond it are
      lost.
    depth: of the ResNet; see `resnet.make`.
    norm_epsilon: of the ResNet's norms: 0 in torchvision's COCO_V1 weights,
      1e-5 in others.
    fc6_layout: order of the rows of the first dense layer: torch's 'chw', or
      'hwc', in which 16 channels of one position are a sub-vector.
    anchor_sizes: for each of the five maps.
    anchor_ratios: heights over widths.
    num_proposals: boxes that the heads read in inference.
    num_training_proposals: boxes that samples are drawn from in training.
    num_detections: bound of the objects of an image.
    score_threshold: probability that a class must exceed.
    dtype: floating type of the computation; boxes have at least float32.

  Raises:
    InputError: a setting has an unsupported value.
  """
  counts = {
    "min_size": min_size,
    "max_size": max_size,
    "num_proposals": num_proposals,
    "num_training_proposals": num_training_proposals,
    "num_detections": num_detections,
  }
  for name, count in counts.items():
    layers.check_range("Mask R-CNN", name, [count], 1, MOST)
  layers.check_range("Mask R-CNN", "norm_epsilon", [norm_epsilon], 0, 1)
  layers.check_range("Mask R-CNN", "score_threshold", [score_threshold], 0, 1)
  layers.check_range("Mask R-CNN", "anchor_ratios", anchor_ratios, 0.01, 100)
  side = fpn.round_up(max(min_size, max_size))
  shape = (side, side) if canvas is None else tuple(canvas)
  if len(shape) != 2 or any(n < 1 or n % fpn.STRIDE for n in shape):
    raise errors.InputError(
      f"Mask R-CNN does not support canvas={shape}; give height and width as "
      f"multiples of {fpn.STRIDE}, such as ({side}, {side})"
    )
  rows = [row if isinstance(row, Sequence) else () for row in anchor_sizes]
  if len(rows) != len(ANCHOR_SIZES) or len(set(map(len, rows))) != 1:
    raise errors.InputError(
      f"Mask R-CNN does not support anchor_sizes={anchor_sizes}; give "
      f"{len(ANCHOR_SIZES)} rows of one length, such as {ANCHOR_SIZES}"
    )
  for row in rows:
    layers.check_range("Mask R-CNN", "anchor_sizes", row, 1, MOST)
  layers.check_choice("Mask R-CNN", "depth", depth, tuple(resnet.DEPTHS))
  layers.check_choice(
    "Mask R-CNN", "fc6_layout", fc6_layout, tuple(FC6_LAYOUTS)
  )
  layers.check_settings("Mask R-CNN", num_classes, dtype)
  height, width = shape
  return MaskRCNN(
    num_classes,
    min_size,
    max_size,
    (height, width),
    depth,
    norm_epsilon,
    FC6_LAYOUTS[fc6_layout],
    tuple(map(tuple, rows)),
    tuple(anchor_ratios),
    num_proposals,
    num_training_proposals,
    num_detections,
    score_threshold,
    dtype,
  )


def backbone(*, depth: int = 50, **settings: Any) -> tuple[resnet.ResNet, str]:
  """Returns the ImageNet classifier that the body comes from, and its path.

  Args:
    depth: as in `make`.
    **settings: the other settings of `make`, which change nothing here.
  """
  del settings
  return resnet.make(depth=depth, num_classes=1000), "backbone/body"


def _normalize(images: jax.Array, dtype: np.dtype) -> jax.Array:
  """Normalizes images [B, S, T, 3] of 0 to 255 as in the body's training."""
  mean, std = (
    jnp.asarray(values, dtype).reshape(1, 1, 1, -1)
    for values in (IMAGE_MEAN, IMAGE_STD)
  )
  return (images.astype(dtype) / 255 - mean) / std


def _by_image(values: jax.Array, boxes: jax.Array) -> jax.Array:
  """Reshapes values [B * R, ...] of boxes [B, R, 4] to [B, R, ...]."""
  shape = *boxes.shape[:2], *values.shape[1:]
  return values.astype(boxes.dtype).reshape(shape)


def _are_finite(outputs: PyTree) -> jax.Array:
  """Returns bool [B]: for which images arrays [B, ...] are finite."""
  finite = [
    jnp.isfinite(leaf).reshape(len(leaf), -1).all(1)
    for leaf in jax.tree.leaves(outputs)
  ]
  return functools.reduce(jnp.logical_and, finite)


def _ratio(sizes: jax.Array, others: jax.Array) -> jax.Array:
  """Returns sizes / others, [B, 2] each, as (x, y, x, y) float32 [B, 4]."""
  ratio = sizes.astype(jnp.float32) / others.astype(jnp.float32)
  return jnp.concatenate([ratio[:, ::-1], ratio[:, ::-1]], axis=1)

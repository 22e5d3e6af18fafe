"""Box head and mask head of Mask R-CNN (arXiv 1703.06870) on ResNet-FPN.

The box head classifies and refines a box, the mask head finds its pixels.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike

from pqf_jax.models import layers
from pqf_jax.models.mask_rcnn import boxes as box_ops
from pqf_jax.models.mask_rcnn import fpn, matching, nms

BOX_BINS = 7
MASK_BINS = 14
OFFSET_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
NMS_THRESHOLD = 0.5
MIN_SIDE = 1e-2
NUM_SAMPLES = 512
MAX_POSITIVE = 128
MATCHED_FROM = 0.5
# How [R, 7, 7, C] becomes [R, 49 C], by the name of the layer that reads it.
# Names differ so that weights in one order are never loaded as the other.
FLATTEN = {
  "fc6": lambda x: jnp.moveaxis(x, -1, 1).reshape(len(x), -1),
  "fc6_hwc": lambda x: x.reshape(len(x), -1),
}


class BoxSamples(NamedTuple):
  """Boxes of an image to train on; boxes with an object come first.

  Attributes:
    boxes: [R, 4] in pixels of the network's input.
    labels: int32 [R], 0 for background.
    object_index: int32 [R], index of the matched object.
    positive: bool [R], whether the box has an object.
    valid: bool [R], False for padding.
    targets: [R, 4], offsets to the object where positive.
  """

  boxes: jax.Array
  labels: jax.Array
  object_index: jax.Array
  positive: jax.Array
  valid: jax.Array
  targets: jax.Array


class BoxHead(nn.Module):
  """Two dense layers.

  If the first is named fc6, its rows run over (channel, row, column) as in
  torch: 16 consecutive ones are a sub-vector of the paper, and `BlockSpec(16)`
  of the kernel. If it is named fc6_hwc, they run over (row, column, channel): a
  sub-vector then holds 16 channels of one position.
  """

  first: str
  features: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [R, 7, 7, C] to [R, features]."""
    x = FLATTEN[self.first](x)
    for name in (self.first, "fc7"):
      x = nn.relu(layers.dense(self.features, dtype=self.dtype, name=name)(x))
    return x


class BoxPredictor(nn.Module):
  """Class logits and, for every class, box offsets."""

  num_classes: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Maps [R, features] to [R, num_classes] and [R, num_classes, 4]."""
    dense = functools.partial(layers.dense, dtype=self.dtype)
    logits = dense(self.num_classes, name="cls_score")(x)
    offsets = dense(4 * self.num_classes, name="bbox_pred")(x)
    return logits, offsets.reshape(len(x), self.num_classes, 4)


class MaskHead(nn.Module):
  """Four convolutions."""

  features: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [R, 14, 14, C] to [R, 14, 14, features]."""
    conv = functools.partial(fpn.convolution, 3, self.features)
    for i in range(1, 5):
      x = nn.relu(conv(dtype=self.dtype, name=f"mask_fcn{i}")(x))
    return x


class Deconvolution(nn.Module):
  """Transposed convolution of size 2 and stride 2.

  Every position becomes four. The kernel [2, 2, in, out] is torch's
  [in, out, 2, 2].
  """

  features: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [R, H, W, C] to [R, 2 H, 2 W, features]."""
    wide = layers.at_least_float32(self.dtype)
    shape = (2, 2, x.shape[-1], self.features)
    initializer = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
    kernel = self.param("kernel", initializer, shape, wide)
    bias = self.param("bias", nn.initializers.zeros, shape[-1:], wide)
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
    y = jnp.einsum("rhwc,abco->rhawbo", x, kernel)
    y = y.reshape(len(x), 2 * x.shape[1], 2 * x.shape[2], self.features)
    return y + bias.reshape(1, 1, 1, -1)


class MaskPredictor(nn.Module):
  """Mask logits for every class."""

  num_classes: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [R, 14, 14, C] to [R, 28, 28, num_classes]."""
    x = Deconvolution(x.shape[-1], self.dtype, name="conv5_mask")(x)
    logits = fpn.convolution(
      1, self.num_classes, dtype=self.dtype, name="mask_fcn_logits"
    )
    return logits(nn.relu(x))


class RoIHeads(nn.Module):
  """Both heads; `first_dense` is a name in `FLATTEN`."""

  num_classes: int
  first_dense: str
  box_features: int
  mask_features: int
  dtype: DTypeLike

  def setup(self) -> None:
    """Creates the layers under torchvision's names."""
    self.box_head = BoxHead(self.first_dense, self.box_features, self.dtype)
    self.box_predictor = BoxPredictor(self.num_classes, self.dtype)
    self.mask_head = MaskHead(self.mask_features, self.dtype)
    self.mask_predictor = MaskPredictor(self.num_classes, self.dtype)

  def classify(self, pooled: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Maps [R, 7, 7, C] to class logits [R, C'] and offsets [R, C', 4]."""
    return self.box_predictor(self.box_head(pooled))

  def segment(self, pooled: jax.Array, labels: jax.Array) -> jax.Array:
    """Maps [R, 14, 14, C] to mask logits [R, 28, 28] of the labels int [R]."""
    logits = self.mask_predictor(self.mask_head(pooled))
    index = labels[:, None, None, None]
    return jnp.take_along_axis(logits, index, axis=3)[..., 0]


def select_detections(
  logits: jax.Array,
  offsets: jax.Array,
  boxes: jax.Array,
  valid: jax.Array,
  scaled: jax.Array,
  *,
  score_threshold: float,
  num_detections: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Selects the final boxes of one image.

  Args:
    logits: [R, C] with background as class 0.
    offsets: [R, C, 4].
    boxes: [R, 4], the proposals.
    valid: bool [R].
    scaled: int [2], height and width of the image.
    score_threshold: probability that a class must exceed.
    num_detections: K.

  Returns:
    (boxes [K, 4] in pixels of the network's input, best first, scores [K],
    labels int32 [K] from 1, bool [K]: which of them exist; the others are 0.)
  """
  scores = nn.softmax(logits, axis=-1)[:, 1:]
  moved = box_ops.decode(offsets, boxes[:, None], weights=OFFSET_WEIGHTS)
  height, width = scaled.astype(boxes.dtype)
  moved = box_ops.clip(moved, height, width)[:, 1:]
  is_candidate = valid[:, None] & (scores > score_threshold)
  is_candidate &= box_ops.is_large(moved, MIN_SIDE)
  scores = jnp.where(is_candidate, scores, -1).ravel()
  # At most so many classes of a box can exceed the threshold.
  max_classes = min(logits.shape[1] - 1, int(1 / max(score_threshold, 1e-9)))
  scores, index = lax.top_k(scores, len(boxes) * max_classes)
  labels = (index % (logits.shape[1] - 1) + 1).astype(jnp.int32)
  moved = moved.reshape(-1, 4)[index]
  kept, exists = nms.best_boxes(
    moved, labels, scores >= 0, threshold=NMS_THRESHOLD, num_best=num_detections
  )
  return (
    jnp.where(exists[:, None], moved[kept], 0),
    jnp.where(exists, scores[kept], 0),
    jnp.where(exists, labels[kept], 0),
    exists,
  )


def training_samples(
  key: jax.Array,
  boxes: jax.Array,
  valid: jax.Array,
  objects: jax.Array,
  labels: jax.Array,
  exists: jax.Array,
) -> BoxSamples:
  """Samples from the proposals and the objects of one image.

  Args:
    key: consumed.
    boxes: proposals [K, 4].
    valid: bool [K].
    objects: boxes [G, 4].
    labels: int [G].
    exists: bool [G].
  """
  boxes = lax.stop_gradient(jnp.concatenate([boxes, objects]))
  valid = jnp.concatenate([valid, exists])
  matches = matching.match(
    objects,
    exists,
    boxes,
    valid,
    low=MATCHED_FROM,
    high=MATCHED_FROM,
    allow_low_quality=False,
  )
  samples = matching.sample(
    matches,
    matching.draw_priorities(key, len(boxes)),
    num_samples=NUM_SAMPLES,
    max_positive=MAX_POSITIVE,
  )
  object_index = matches.object_index[samples.indices]
  boxes = boxes[samples.indices]
  return BoxSamples(
    boxes,
    jnp.where(samples.positive, labels[object_index], 0),
    object_index,
    samples.positive,
    samples.valid,
    box_ops.encode(objects[object_index], boxes, weights=OFFSET_WEIGHTS),
  )

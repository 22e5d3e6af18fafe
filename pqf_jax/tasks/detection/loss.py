"""The five losses of Mask R-CNN, as torchvision's, or with a teacher.

Each is normalized over the whole batch, so that an image weighs by the number
of its samples (arXiv 1506.01497, equation 1, and 1703.06870, section 3).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import lax

from pqf_jax import errors, finetune

PyTree = Any
Batch = Mapping[str, Any]
# Where the smooth L1 loss of boxes turns from square to linear.
SMOOTH_BELOW = 1 / 9


class _Anchors(Protocol):
  logits: jax.Array
  positive: jax.Array
  valid: jax.Array
  offsets: jax.Array
  targets: jax.Array


class _Boxes(Protocol):
  labels: jax.Array
  positive: jax.Array
  valid: jax.Array
  targets: jax.Array


class Outputs(Protocol):
  """Outputs of a model for sampled anchors and boxes, with their targets.

  Attributes:
    anchors: `logits`, `positive`, `valid` [B, N]; `offsets`, `targets`
      [B, N, 4].
    boxes: `labels`, `positive`, `valid` [B, R]; `targets` [B, R, 4].
    class_logits: [B, R, num_classes].
    box_offsets: [B, R, 4].
    mask_logits: [B, M, P, P].
    mask_targets: [B, M, P, P], from 0 to 1.
    mask_valid: bool [B, M].
  """

  anchors: _Anchors
  boxes: _Boxes
  class_logits: jax.Array
  box_offsets: jax.Array
  mask_logits: jax.Array
  mask_targets: jax.Array
  mask_valid: jax.Array


class RawOutputs(Protocol):
  """What a model says of all anchors, of some boxes and of their masks.

  Attributes:
    exists: bool [B, N].
    anchor_logits: [B, N].
    anchor_offsets: [B, N, 4].
    class_logits: [B, R, num_classes].
    box_offsets: [B, R, 4].
    mask_logits: [B, M, P, P], of the first M boxes.
  """

  exists: jax.Array
  anchor_logits: jax.Array
  anchor_offsets: jax.Array
  class_logits: jax.Array
  box_offsets: jax.Array
  mask_logits: jax.Array


class Places(Protocol):
  """Where a model looks: `boxes` [B, R, 4]; `valid` [B, R]."""

  boxes: jax.Array
  valid: jax.Array


PlacesFn = Callable[[PyTree, jax.Array, jax.Array], Places]
"""(variables, images, sizes) -> the boxes that a teacher looks at."""

RawFn = Callable[[PyTree, jax.Array, jax.Array, Places], RawOutputs]
"""(variables, images, sizes, places) -> outputs, which depend on no choice."""

ForwardFn = Callable[[PyTree, Batch, jax.Array], Outputs]
"""(variables, batch, key) -> outputs; samples are drawn with the key."""


def make_loss(
  forward_fn: ForwardFn,
  raw_fn: RawFn | None = None,
  *,
  axis: str | None = None,
  share: float = 0.0,
  temperature: float = 1.0,
) -> finetune.LossFn:
  """Builds the sum of the five losses, with norms in evaluation mode.

  Args:
    forward_fn: such as `functools.partial(model.apply,
      method="training_outputs")` of `models.mask_rcnn`.
    raw_fn: likewise with "raw_outputs"; needed where there is a share.
    axis: along which devices share the batch, under a `shard_map`: the mean of
      their losses is that of the whole batch. None: they do not share it.
    share: of the loss, 0 to 1, that is `follow_teacher`; batches then come
      through `make_teacher`. With 1 annotations are not looked at.
    temperature: see `follow_teacher`.

  Returns:
    A `finetune.LossFn` over batches as the model's method takes them. It also
    reports each of the losses.

  Raises:
    InputError: there is a share, but no `raw_fn`.
  """
  if share and raw_fn is None:
    raise errors.InputError(f"share is {share:g}; it needs raw_fn")

  def loss_fn(
    variables: PyTree, batch: Batch, key: jax.Array
  ) -> tuple[jax.Array, tuple[PyTree, finetune.Metrics]]:
    losses: dict[str, jax.Array] = {}
    if share < 1:
      losses = compute_losses(forward_fn(variables, batch, key), axis=axis)
    if share and raw_fn is not None:
      places = batch["places"]
      taught = follow_teacher(
        raw_fn(variables, batch["image"], batch["size"], places),
        batch["teacher"],
        places,
        axis=axis,
        temperature=temperature,
      )
      losses = {
        name: share * loss + (1 - share) * losses.get(name, 0)
        for name, loss in taught.items()
      }
    total = functools.reduce(jnp.add, losses.values())
    return total, ({}, losses)

  return loss_fn


def make_teacher(
  places_fn: PlacesFn, raw_fn: RawFn, variables: PyTree
) -> Callable[[Batch], Batch]:
  """Builds a function that adds a teacher's `places` and outputs to a batch."""

  @jax.jit
  def look(
    variables: PyTree, images: jax.Array, sizes: jax.Array
  ) -> tuple[Places, RawOutputs]:
    places = places_fn(variables, images, sizes)
    return places, raw_fn(variables, images, sizes, places)

  def add(batch: Batch) -> Batch:
    # An argument, because a constant of that size would be compiled in.
    places, outputs = look(variables, batch["image"], batch["size"])
    return {**batch, "places": places, "teacher": outputs}

  return add


def compute_losses(
  outputs: Outputs, *, axis: str | None = None
) -> dict[str, jax.Array]:
  """Returns {torchvision's name: loss}; 0 where nothing was sampled."""
  mean = functools.partial(_mean, axis=axis)
  anchors, boxes = outputs.anchors, outputs.boxes
  objectness = optax.sigmoid_binary_cross_entropy(
    anchors.logits, anchors.positive.astype(anchors.logits.dtype)
  )
  classes = optax.softmax_cross_entropy_with_integer_labels(
    outputs.class_logits, boxes.labels
  )
  masks = optax.sigmoid_binary_cross_entropy(
    outputs.mask_logits, outputs.mask_targets
  )
  return {
    "loss_objectness": mean(objectness, anchors.valid, anchors.valid),
    "loss_rpn_box_reg": mean(
      _smooth_l1(anchors.offsets - anchors.targets),
      anchors.positive,
      anchors.valid,
    ),
    "loss_classifier": mean(classes, boxes.valid, boxes.valid),
    "loss_box_reg": mean(
      _smooth_l1(outputs.box_offsets - boxes.targets),
      boxes.positive,
      boxes.valid,
    ),
    "loss_mask": mean(
      masks.mean((2, 3)), outputs.mask_valid, outputs.mask_valid
    ),
  }


def follow_teacher(
  outputs: RawOutputs,
  taught: RawOutputs,
  places: Places,
  *,
  axis: str | None = None,
  temperature: float = 1.0,
) -> dict[str, jax.Array]:
  """Returns the five losses with a teacher's outputs in place of annotations.

  Anchors, boxes and masks count by the probability of an object that the
  teacher gives them, where annotations say yes or no.

  Args:
    outputs: of the network that learns.
    taught: of the teacher, at the same places.
    places: the teacher's.
    axis: see `make_loss`.
    temperature: T; probabilities are those of logits / T in cross-entropies,
      which count T^2 times (arXiv 1503.02531, section 2).
  """
  mean = functools.partial(_mean, axis=axis)

  def entropy(logits: jax.Array, wanted: jax.Array) -> jax.Array:
    probabilities = jax.nn.sigmoid(wanted / temperature)
    return temperature**2 * optax.sigmoid_binary_cross_entropy(
      logits / temperature, probabilities
    )

  likely = jax.nn.sigmoid(taught.anchor_logits)
  likely = jnp.where(taught.exists, likely, 0)
  objects = 1 - jax.nn.softmax(taught.class_logits)[:, :, 0]
  objects = jnp.where(places.valid, objects, 0)
  of_masks = objects[:, : taught.mask_logits.shape[1]]
  classes = temperature**2 * optax.softmax_cross_entropy(
    outputs.class_logits / temperature,
    jax.nn.softmax(taught.class_logits / temperature),
  )
  return {
    "loss_objectness": mean(
      entropy(outputs.anchor_logits, taught.anchor_logits),
      taught.exists,
      likely,
    ),
    "loss_rpn_box_reg": mean(
      _smooth_l1(outputs.anchor_offsets - taught.anchor_offsets),
      likely,
      likely,
    ),
    "loss_classifier": mean(classes, places.valid, places.valid),
    "loss_box_reg": mean(
      _smooth_l1(outputs.box_offsets - taught.box_offsets),
      objects,
      places.valid,
    ),
    "loss_mask": mean(
      entropy(outputs.mask_logits, taught.mask_logits).mean((2, 3)),
      of_masks,
      of_masks,
    ),
  }


def _smooth_l1(missed: jax.Array) -> jax.Array:
  """Returns the sum over the four offsets: [..., 4] -> [...]."""
  size = jnp.abs(missed)
  square = 0.5 * jnp.square(missed) / SMOOTH_BELOW
  linear = size - 0.5 * SMOOTH_BELOW
  return jnp.where(size < SMOOTH_BELOW, square, linear).sum(-1)


def _mean(
  values: jax.Array, mask: jax.Array, counted: jax.Array, *, axis: str | None
) -> jax.Array:
  """Returns the sum of the values in `mask` over the number of `counted`.

  Both may be weights too. With an axis the number is the average over devices,
  so that the mean over devices is the sum of all values over the number of all.
  """
  weights = mask.astype(values.dtype)
  total = jnp.where(weights != 0, values * weights, 0).sum()
  count = counted.sum().astype(total.dtype)
  if axis is not None:
    count = lax.pmean(count, axis)
  return total / jnp.where(count > 0, count, 1)

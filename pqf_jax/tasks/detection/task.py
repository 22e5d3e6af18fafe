"""The task object of detection and instance segmentation."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from pqf_jax import data, errors, finetune
from pqf_jax.models import contract as models
from pqf_jax.runtime import distributed, progress
from pqf_jax.tasks import batches, contract
from pqf_jax.tasks.detection import average_precision, prediction
from pqf_jax.tasks.detection import loss as losses

PyTree = Any
# The values of `config.mode` that read training images.
TRAINING_MODES = ("compress", "plan", "train")
SETTINGS = (
  *("data.name", "data.image_size", "data.num_objects"),
  "distillation.temperature",
)
METHODS = ("training_outputs", "find_places", "raw_outputs")
# What a preflight assumes where the config leaves it to the data: the largest
# side of an image of COCO, and more objects than any of its images has.
IMAGE_SIDE = 640
NUM_OBJECTS = 100


class Detection:
  """Networks that find objects, their boxes and their masks.

  A network has, beside `apply(variables, images, sizes)`, the methods of
  `METHODS`; see `losses.Outputs` and `losses.RawOutputs`.
  """

  metrics = {"mask_ap": "mask AP", "box_ap": "box AP"}

  def sample(self, config: ml_collections.ConfigDict) -> tuple[jax.Array, ...]:
    """See `contract.Task`."""
    del config
    # In zeros a detector finds nothing that a permutation could change.
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (1, 96, 128, 3), np.uint8)
    return jnp.asarray(pixels), jnp.array([[96, 128]], jnp.int32)

  def check(
    self,
    config: ml_collections.ConfigDict,
    network: models.Network,
    template: PyTree,
    *,
    num_devices: int,
  ) -> None:
    """See `contract.Task`."""
    del num_devices  # norms are in evaluation mode
    name = config.model.name
    contract.refuse_unused(config, SETTINGS)
    for method in METHODS:
      if not hasattr(network, method):
        raise errors.InputError(
          f"model {name!r} has no method {method}, which detection needs; "
          "choose a detector such as 'mask_rcnn', or "
          "config.task=classification"
        )
    models.check_trainable(
      name, network, template, dtype=config.dtype, norm_axis=None
    )

  def load(
    self, config: ml_collections.ConfigDict, network: models.Network
  ) -> contract.LoadedTask:
    """See `contract.Task`."""
    dataset = prediction.open_dataset(
      config, with_train=config.mode in TRAINING_MODES
    )
    for note in dataset.notes:
      progress.say(note)
    detect = prediction.make_detect(network)
    measure = average_precision.make_evaluate(
      detect, dataset, gather=distributed.gather_lists
    )

    def evaluate(variables: PyTree) -> dict[str, float]:
      found = data.eval_batches(
        dataset, batch_size=config.eval_batch_size, **distributed.position()
      )
      return measure(prediction.place(variables), found)

    def train_batches(**order: Any) -> Iterator[finetune.Batch]:
      for batch in data.train_batches(
        dataset, **order, **distributed.position()
      ):
        del batch["image_id"]  # int64, which devices do not have
        yield distributed.shard(batch)

    find_places = jax.jit(_find_places(network))

    def samples(variables: PyTree, *which: int) -> list[tuple[Any, ...]]:
      inputs = [
        (jnp.asarray(batch["image"]), jnp.asarray(batch["size"]))
        for batch in batches.whole_batches(dataset, *which)
      ]
      return [(*each, find_places(variables, *each)) for each in inputs]

    return contract.LoadedTask(
      num_train=len(dataset.train or ()),
      train_batches=train_batches,
      outputs=_raw_outputs(network),
      samples=samples,
      make_loss=lambda taught: _loss(config, network, taught=taught),
      make_teacher=lambda variables: _make_teacher(
        network, distributed.replicate(variables)
      ),
      evaluate=evaluate,
      pictures=functools.partial(
        prediction.pictures, detect, dataset, config.eval_batch_size
      ),
      fingerprint=functools.partial(data.fingerprint, dataset),
    )

  def abstract_programs(
    self, config: ml_collections.ConfigDict, network: models.Network
  ) -> contract.AbstractPrograms:
    """See `contract.Task`."""
    side = config.data.image_size or IMAGE_SIDE
    objects = config.data.num_objects or NUM_OBJECTS

    def eval_batch(size: int) -> contract.Shapes:
      return {
        "image": jax.ShapeDtypeStruct((size, side, side, 3), jnp.uint8),
        "size": jax.ShapeDtypeStruct((size, 2), jnp.int32),
      }

    def train_batch(size: int) -> contract.Shapes:
      rows = size, objects
      batch = eval_batch(size) | {
        "boxes": jax.ShapeDtypeStruct((*rows, 4), jnp.float32),
        "labels": jax.ShapeDtypeStruct(rows, jnp.int32),
        "valid": jax.ShapeDtypeStruct(rows, jnp.bool_),
        "masks": jax.ShapeDtypeStruct((*rows, side, -(-side // 8)), jnp.uint8),
      }
      if not config.distillation.share:
        return batch
      template = jax.eval_shape(
        network.init, jax.random.key(0), *self.sample(config)
      )
      return jax.eval_shape(
        lambda variables, batch: _make_teacher(network, variables)(batch),
        template,
        batch,
      )

    return contract.AbstractPrograms(
      loss_fn=_loss(config, network, taught=True),
      train_batch=train_batch,
      infer=lambda variables, batch: network.apply(
        variables, batch["image"], batch["size"]
      ),
      eval_batch=eval_batch,
    )

  # What `config.mode=predict` does.
  predict = staticmethod(prediction.predict)


TASK = Detection()


def _loss(
  config: ml_collections.ConfigDict, network: models.Network, *, taught: bool
) -> finetune.LossFn:
  """Returns the loss of the config, or without a teacher that of its labels."""
  trained = models.for_training(network, dtype=config.dtype)
  return losses.make_loss(
    functools.partial(trained.apply, method="training_outputs"),
    _raw_outputs(trained),
    axis=distributed.AXIS,
    **(contract.teacher_settings(config) if taught else {}),
  )


def _find_places(network: models.Network) -> losses.PlacesFn:
  return functools.partial(network.apply, method="find_places")


def _raw_outputs(network: models.Network) -> losses.RawFn:
  return functools.partial(network.apply, method="raw_outputs")


def _make_teacher(
  network: models.Network, variables: PyTree
) -> Callable[[finetune.Batch], finetune.Batch]:
  return losses.make_teacher(
    _find_places(network), _raw_outputs(network), variables
  )

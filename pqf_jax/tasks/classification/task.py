"""The task object of image classification."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from pqf_jax import data, errors, finetune
from pqf_jax.models import contract as models
from pqf_jax.runtime import distributed
from pqf_jax.tasks import batches, contract
from pqf_jax.tasks.classification import evaluation
from pqf_jax.tasks.classification import loss as losses

PyTree = Any
# Convolutional networks take any size; this one suits every stem and is cheap.
# Others have a setting `image_size`.
SAMPLE_SIDE = 64
UNUSED = {"data.num_objects", "data.length", "data.vocabulary"}
# Of fewer, nearly any network has the right one among its first five.
FEW_CLASSES = 20


class Classification:
  """Networks that map images [B, H, W, 3] to logits [B, num_classes]."""

  metrics = {"top1": "top-1", "top5": "top-5"}

  def sample(self, config: ml_collections.ConfigDict) -> tuple[jax.Array, ...]:
    """See `contract.Task`."""
    side = config.model.get("image_size", SAMPLE_SIDE)
    return (jnp.zeros((1, side, side, 3)),)

  def check(
    self,
    config: ml_collections.ConfigDict,
    network: models.Network,
    template: PyTree,
    *,
    num_devices: int,
  ) -> None:
    """See `contract.Task`."""
    contract.refuse_unused(config, contract.UNASKED.keys() - UNUSED)
    _check_labels(config)
    _check_mirrored(config)
    name = config.model.name
    models.check_trainable(
      name,
      network,
      template,
      dtype=config.dtype,
      norm_axis=_norm_axis(config) if num_devices > 1 else None,
    )
    outputs = jax.eval_shape(network.apply, template, *self.sample(config))
    wanted = (1, config.model.num_classes)
    if getattr(outputs, "shape", None) != wanted:
      shapes = [leaf.shape for leaf in jax.tree.leaves(outputs)]
      raise errors.InputError(
        f"model {name!r} maps one image to outputs of shape "
        f"{', '.join(map(str, shapes))}; classification needs logits {wanted}"
      )

  def load(
    self, config: ml_collections.ConfigDict, network: models.Network
  ) -> contract.LoadedTask:
    """See `contract.Task`."""
    dataset = open_dataset(config)
    if not config.data.unlabelled:
      return self._on(dataset, config, network)
    unlabelled = data.use_unlabelled(dataset, config.data.unlabelled)
    task = self._on(unlabelled, config, network)
    if config.weights or not config.train.epochs:
      return task
    labelled = self._on(dataset, config, network)
    return task._replace(
      labelled=labelled,
      fingerprint=lambda: f"{labelled.fingerprint()} {task.fingerprint()}",
    )

  def count_classes(self, config: ml_collections.ConfigDict) -> int:
    """See `contract.Task`."""
    return _get_dataset(config).num_classes

  def _on(
    self,
    dataset: data.ImageDataset,
    config: ml_collections.ConfigDict,
    network: models.Network,
  ) -> contract.LoadedTask:
    """Returns the task on a data set."""
    preprocess = functools.partial(
      data.normalize, mean=dataset.mean, std=dataset.std
    )
    infer = models.apply_function(network)
    count = evaluation.make_evaluate(infer, preprocess)

    def evaluate(variables: PyTree) -> dict[str, float]:
      found = batches.global_test_batches(dataset, config.eval_batch_size)
      return count(distributed.replicate(variables), found)

    def samples(variables: PyTree, *which: int) -> list[tuple[Any, ...]]:
      del variables
      found = batches.whole_batches(dataset, *which)
      return [(preprocess(jnp.asarray(batch["image"])),) for batch in found]

    return contract.LoadedTask(
      num_train=len(dataset.train),
      train_batches=functools.partial(batches.global_batches, dataset),
      outputs=network.apply,
      samples=samples,
      make_loss=lambda taught: _make_loss(config, network, preprocess, taught),
      make_teacher=lambda variables: losses.make_teacher(
        infer,
        preprocess,
        distributed.replicate(variables),
        mirrored=config.distillation.mirrored,
      ),
      evaluate=evaluate,
      pictures=lambda networks: [],
      fingerprint=functools.partial(data.fingerprint, dataset),
      hidden=("top5",) if dataset.num_classes < FEW_CLASSES else (),
    )

  def abstract_programs(
    self, config: ml_collections.ConfigDict, network: models.Network
  ) -> contract.AbstractPrograms:
    """See `contract.Task`."""
    # Constants of the program: their values cost nothing.
    preprocess = functools.partial(
      data.normalize, mean=(0.5,) * 3, std=(1,) * 3
    )
    wanted = config.data
    side = wanted.crop or wanted.image_size or data.usual_size(wanted.name)

    def batch(size: int, fields: contract.Shapes) -> contract.Shapes:
      image = jax.ShapeDtypeStruct((size, side, side, 3), jnp.uint8)
      label = jax.ShapeDtypeStruct((size,), jnp.int32)
      return {"image": image, "label": label} | fields

    def train_batch(size: int) -> contract.Shapes:
      if not config.distillation.share:
        return batch(size, {})
      size *= 1 + config.distillation.mirrored
      shape = size, config.model.num_classes
      logits = jax.ShapeDtypeStruct(shape, jnp.float32)
      return batch(size, {"teacher_logits": logits})

    def eval_batch(size: int) -> contract.Shapes:
      return batch(size, {"mask": jax.ShapeDtypeStruct((size,), jnp.float32)})

    return contract.AbstractPrograms(
      loss_fn=_make_loss(config, network, preprocess, taught=True),
      train_batch=train_batch,
      infer=evaluation.make_count(models.apply_function(network), preprocess),
      eval_batch=eval_batch,
    )


TASK = Classification()


def training_apply(
  config: ml_collections.ConfigDict, network: models.Network
) -> losses.ApplyFn:
  """Returns the network's `apply` in a training step of the config."""
  trained = models.for_training(
    network, dtype=config.dtype, norm_axis=_norm_axis(config)
  )
  return models.apply_function(trained)


def _check_labels(config: ml_collections.ConfigDict) -> None:
  """Refuses to train on images without labels where the loss needs them."""
  if not config.data.unlabelled:
    return
  share = config.distillation.share
  if config.finetune.epochs and share < 1:
    raise errors.InputError(
      f"config.data.unlabelled is {config.data.unlabelled!r}, but "
      f"config.distillation.share is {share:g}, so that the fine-tuning loss "
      "needs labels; give --config.distillation.share=1, or "
      "--config.finetune.epochs=0"
    )


def _check_mirrored(config: ml_collections.ConfigDict) -> None:
  """Refuses mirror images where no teacher looks at them."""
  if config.distillation.mirrored and not config.distillation.share:
    raise errors.InputError(
      "config.distillation.mirrored is True, but config.distillation.share is "
      "0, so that no teacher looks at mirror images; give "
      "--config.distillation.share=1, or --config.distillation.mirrored=False"
    )


def _make_loss(
  config: ml_collections.ConfigDict,
  network: models.Network,
  preprocess: losses.Preprocess,
  taught: bool,
) -> finetune.LossFn:
  """Returns the loss of the config, or without a teacher that of its labels."""
  return losses.make_loss(
    training_apply(config, network),
    preprocess,
    **(contract.teacher_settings(config) if taught else {}),
  )


def open_dataset(config: ml_collections.ConfigDict) -> data.ImageDataset:
  """Opens the labelled images of `config.data`.

  Raises:
    InputError: they are missing or damaged, or have another number of classes.
  """
  dataset = _get_dataset(config)
  if dataset.num_classes != config.model.num_classes:
    raise errors.InputError(
      f"config.model.num_classes is {config.model.num_classes}, but "
      f"{config.data.name} has {dataset.num_classes} classes"
    )
  changes = data.preparation_changes(config.data)
  if changes:
    dataset = data.prepare_otherwise(dataset, **changes)
  return dataset._replace(
    mean=tuple(config.data.mean) or dataset.mean,
    std=tuple(config.data.std) or dataset.std,
  )


def _norm_axis(config: ml_collections.ConfigDict) -> str | None:
  """Returns the axis over which norms average in training."""
  return distributed.AXIS if config.norm_statistics == "batch" else None


def _get_dataset(config: ml_collections.ConfigDict) -> data.ImageDataset:
  return data.get_dataset(
    config.data.name,
    data_dir=config.data.dir or None,
    image_size=config.data.image_size or None,
  )

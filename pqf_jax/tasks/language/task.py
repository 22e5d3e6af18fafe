"""The task object of language models."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from pqf_jax import data, errors, finetune
from pqf_jax.data import texts
from pqf_jax.models import contract as models
from pqf_jax.runtime import distributed
from pqf_jax.tasks import batches, contract
from pqf_jax.tasks.classification import loss as losses

PyTree = Any
Batch = Mapping[str, jax.Array]
SETTINGS = ("data.name", "data.length", "distillation.temperature")


class Language:
  """Networks that map tokens [B, T] to logits [B, T, tokens] of the next ones.

  Tokens are bytes. A network has a field `positions`, the tokens of its longest
  sequence. `perplexity` is in results.json; tables show its inverse.
  """

  metrics = {"probability": "byte likelihood", "top1": "top-1"}
  unit = "sequences"

  def sample(self, config: ml_collections.ConfigDict) -> tuple[jax.Array, ...]:
    """See `contract.Task`."""
    del config
    return (jnp.arange(1, 5, dtype=jnp.int32)[None],)

  def check(
    self,
    config: ml_collections.ConfigDict,
    network: models.Network,
    template: PyTree,
    *,
    num_devices: int,
  ) -> None:
    """See `contract.Task`."""
    del num_devices  # there are no statistics of a batch
    name = config.model.name
    contract.refuse_unused(config, SETTINGS)
    models.check_trainable(
      name, network, template, dtype=config.dtype, norm_axis=None
    )
    _length(config, network)
    (tokens,) = self.sample(config)
    outputs = jax.eval_shape(network.apply, template, tokens)
    shape: tuple[int, ...] = getattr(outputs, "shape", ())
    if len(shape) != 3 or shape[:2] != tokens.shape or shape[2] < 256:
      raise errors.InputError(
        f"model {name!r} maps {tokens.shape} bytes to outputs of shape "
        f"{', '.join(str(leaf.shape) for leaf in jax.tree.leaves(outputs))}; "
        "a language model gives 256 or more logits for each"
      )

  def load(
    self, config: ml_collections.ConfigDict, network: models.Network
  ) -> contract.LoadedTask:
    """See `contract.Task`."""
    dataset = texts.load(
      config.data.name, config.data.dir, length=_length(config, network)
    )
    count = jax.jit(make_count(network.apply))

    def evaluate(variables: PyTree) -> dict[str, float]:
      found = batches.global_test_batches(dataset, config.eval_batch_size)
      placed = distributed.replicate(variables)
      counts = [count(placed, batch) for batch in found]
      return _figures(*(float(total) for total in sum(counts)))

    def samples(variables: PyTree, *which: int) -> list[tuple[Any, ...]]:
      del variables
      found = batches.whole_batches(dataset, *which)
      return [(jnp.asarray(batch["tokens"][:, :-1]),) for batch in found]

    def make_teacher(variables: PyTree) -> Callable[[Batch], Batch]:
      teach = losses.make_teacher(
        models.apply_function(network), _same, distributed.replicate(variables)
      )
      return lambda batch: teach(_as_classes(batch))

    return contract.LoadedTask(
      num_train=len(dataset.train),
      train_batches=functools.partial(batches.global_batches, dataset),
      outputs=network.apply,
      samples=samples,
      make_loss=lambda taught: _make_loss(config, network, taught),
      make_teacher=make_teacher,
      evaluate=evaluate,
      pictures=lambda networks: [],
      fingerprint=functools.partial(data.fingerprint, dataset),
    )

  def abstract_programs(
    self, config: ml_collections.ConfigDict, network: models.Network
  ) -> contract.AbstractPrograms:
    """See `contract.Task`."""
    length = _length(config, network)

    def train_batch(size: int) -> contract.Shapes:
      tokens = jax.ShapeDtypeStruct((size, length + 1), jnp.int32)
      if not config.distillation.share:
        return {"tokens": tokens}
      inputs = jax.ShapeDtypeStruct((size, length), jnp.int32)
      variables = jax.eval_shape(network.init, jax.random.key(0), inputs)
      logits = jax.eval_shape(network.apply, variables, inputs)
      return {"tokens": tokens, "teacher_logits": logits}

    def eval_batch(size: int) -> contract.Shapes:
      tokens = jax.ShapeDtypeStruct((size, length + 1), jnp.int32)
      return {
        "tokens": tokens,
        "mask": jax.ShapeDtypeStruct((size,), jnp.float32),
      }

    return contract.AbstractPrograms(
      loss_fn=_make_loss(config, network, taught=True),
      train_batch=train_batch,
      infer=make_count(network.apply),
      eval_batch=eval_batch,
    )


TASK = Language()


def make_count(
  apply_fn: Callable[..., jax.Array],
) -> Callable[[PyTree, Batch], jax.Array]:
  """Builds (variables, batch) -> [nats, top-1 hits, tokens, sequences].

  Only sequences whose `mask` is 1 count.
  """

  def count(variables: PyTree, batch: Batch) -> jax.Array:
    inputs, wanted = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
    logits = apply_fn(variables, inputs)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
    hits = (logits.argmax(-1) == wanted).astype(nats.dtype)
    ones = jnp.ones_like(nats)
    sums = jnp.stack([nats.sum(1), hits.sum(1), ones.sum(1), ones[:, 0]])
    return (sums * batch["mask"][None]).sum(1)

  return count


def _figures(
  nats: float, hits: float, tokens: float, sequences: float
) -> dict[str, float]:
  if not math.isfinite(nats):
    raise errors.InputError(
      "the cross-entropy is not finite; the weights are damaged, overflow, or "
      "their training diverged: use others"
    )
  mean = nats / tokens
  return {
    "probability": math.exp(-mean),
    "perplexity": math.exp(min(mean, 700)),
    "top1": hits / tokens,
    "images": int(sequences),
  }


def _as_classes(batch: Batch) -> Batch:
  """Returns the batch of a classifier whose classes are the next tokens."""
  tokens = batch["tokens"]
  return {**batch, "image": tokens[:, :-1], "label": tokens[:, 1:]}


def _same(tokens: jax.Array) -> jax.Array:
  return tokens


def _make_loss(
  config: ml_collections.ConfigDict, network: models.Network, taught: bool
) -> finetune.LossFn:
  trained = models.for_training(network, dtype=config.dtype)
  loss_fn = losses.make_loss(
    models.apply_function(trained),
    _same,
    **(contract.teacher_settings(config) if taught else {}),
  )
  return lambda variables, batch, key: loss_fn(
    variables, _as_classes(batch), key
  )


def _length(config: ml_collections.ConfigDict, network: models.Network) -> int:
  """Returns the tokens of a sequence.

  Raises:
    InputError: the network has no positions, or fewer than
      `config.data.length`.
  """
  positions = getattr(network, "positions", None)
  if not isinstance(positions, int):
    raise errors.InputError(
      f"model {config.model.name!r} has no field positions, which a language "
      "model needs; choose a model such as 'decoder'"
    )
  length: int = config.data.length or positions
  if length > positions:
    raise errors.InputError(
      f"config.data.length is {length}; give 1 to {positions}, the positions "
      "of the network, or 0 for all of them"
    )
  return length

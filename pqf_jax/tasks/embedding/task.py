"""The task object of sentence embeddings."""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from pqf_jax import data, errors, finetune
from pqf_jax.data import sentences
from pqf_jax.models import contract as models
from pqf_jax.runtime import distributed
from pqf_jax.tasks import batches, contract
from pqf_jax.tasks.embedding import evaluation
from pqf_jax.tasks.embedding import loss as losses

PyTree = Any
SETTINGS = ("data.length", "data.vocabulary")


class Embedding:
  """Networks that map tokens [B, T] to embeddings [B, features].

  Token 0 is padding. A network has two fields, `vocabulary`, its number of
  tokens, and `positions`, the tokens of its longest sentence. It is trained
  elsewhere; all figures compare it with the dense network, in whose order the
  entries of an embedding stay.
  """

  metrics = {
    "cosine": "mean cosine",
    "worst": "worst cosine",
    "nearest": "same nearest",
  }
  unit = "sentences"

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
    contract.refuse_unused(config, SETTINGS)
    name = config.model.name
    if not config.weights:
      raise errors.InputError(
        "config.weights is empty, and embeddings are not trained from scratch; "
        "give --config.weights=FILE.safetensors"
      )
    lacking = [
      field
      for field in ("vocabulary", "positions")
      if not isinstance(getattr(network, field, None), int)
    ]
    if lacking:
      raise errors.InputError(
        f"model {name!r} has no field {' or '.join(lacking)}, which embedding "
        "needs to read sentences; choose a model such as 'bert'"
      )
    share = config.distillation.share
    if config.finetune.epochs and share != 1:
      raise errors.InputError(
        f"config.distillation.share is {share:g}, but sentences have no "
        "labels; give --config.distillation.share=1, or "
        "--config.finetune.epochs=0"
      )
    models.check_trainable(
      name, network, template, dtype=config.dtype, norm_axis=None
    )
    outputs = jax.eval_shape(network.apply, template, *self.sample(config))
    if len(getattr(outputs, "shape", ())) != 2:
      shapes = [str(leaf.shape) for leaf in jax.tree.leaves(outputs)]
      raise errors.InputError(
        f"model {name!r} maps a sentence to outputs of shape "
        f"{', '.join(shapes)}; embedding needs [sentences, features]"
      )

  def load(
    self, config: ml_collections.ConfigDict, network: models.Network
  ) -> contract.LoadedTask:
    """See `contract.Task`."""
    dataset = _open(config, network)
    embed = evaluation.make_embed(network.apply)

    def embed_test(variables: PyTree) -> np.ndarray:
      # Every process embeds all of them: each is compared with all others.
      local = distributed.unreplicate(distributed.replicate(variables))
      size = config.eval_batch_size
      return embed(local, data.eval_batches(dataset, batch_size=size))

    def samples(variables: PyTree, *which: int) -> list[tuple[Any, ...]]:
      del variables
      found = batches.whole_batches(dataset, *which)
      return [(jnp.asarray(batch["tokens"]),) for batch in found]

    loaded = contract.LoadedTask(
      num_train=len(dataset.train),
      train_batches=functools.partial(batches.global_batches, dataset),
      outputs=network.apply,
      samples=samples,
      make_loss=lambda taught: _make_loss(config, network),
      make_teacher=lambda variables: losses.make_teacher(
        network.apply, distributed.replicate(variables)
      ),
      evaluate=_evaluate_alone,
      pictures=lambda networks: [],
      fingerprint=functools.partial(data.fingerprint, dataset),
      mask_fn=lambda tokens: tokens != 0,
    )

    def beside(dense: PyTree) -> contract.LoadedTask:
      wanted = functools.cache(lambda: embed_test(dense))
      return loaded._replace(
        evaluate=lambda variables: evaluation.compare(
          embed_test(variables), wanted()
        )
      )

    return loaded._replace(beside=beside)

  def abstract_programs(
    self, config: ml_collections.ConfigDict, network: models.Network
  ) -> contract.AbstractPrograms:
    """See `contract.Task`."""
    length = _longest(config, network)

    def eval_batch(size: int) -> contract.Shapes:
      return {"tokens": jax.ShapeDtypeStruct((size, length), jnp.int32)}

    def train_batch(size: int) -> contract.Shapes:
      tokens = eval_batch(size)["tokens"]
      variables = jax.eval_shape(network.init, jax.random.key(0), tokens)
      taught = jax.eval_shape(network.apply, variables, tokens)
      return {"tokens": tokens, "teacher_embeddings": taught}

    return contract.AbstractPrograms(
      loss_fn=_make_loss(config, network),
      train_batch=train_batch,
      infer=lambda variables, batch: network.apply(variables, batch["tokens"]),
      eval_batch=eval_batch,
    )


TASK = Embedding()


def _evaluate_alone(variables: PyTree) -> dict[str, float]:
  raise TypeError("embeddings are evaluated beside those of a dense network")


def _longest(config: ml_collections.ConfigDict, network: models.Network) -> int:
  """Returns how many tokens a sentence may have.

  Raises:
    InputError: `config.data.length` leaves no room for a word, or exceeds the
      network's positions.
  """
  positions: int = getattr(network, "positions", 0)
  longest = config.data.length or positions
  if not 3 <= longest <= positions:
    raise errors.InputError(
      f"config.data.length is {config.data.length}; give 3 to {positions}, the "
      "positions of the network, or 0 for all of them"
    )
  return longest


def _open(
  config: ml_collections.ConfigDict, network: models.Network
) -> sentences.Sentences:
  """Reads the sentences of `config.data`.

  Raises:
    InputError: files are missing or damaged, or the vocabulary is another
      network's.
  """
  beside = os.path.join(os.path.dirname(config.weights), sentences.VOCABULARY)
  path = config.data.vocabulary or beside
  vocabulary = sentences.Vocabulary(path)
  known = getattr(network, "vocabulary", 0)
  if len(vocabulary) > known:
    raise errors.InputError(
      f"{path} has {len(vocabulary)} tokens, but the network {known}; give its "
      "own, config.data.vocabulary"
    )
  return sentences.load(
    config.data.dir, vocabulary, longest=_longest(config, network)
  )


def _make_loss(
  config: ml_collections.ConfigDict, network: models.Network
) -> finetune.LossFn:
  trained = models.for_training(network, dtype=config.dtype)
  return losses.make_loss(trained.apply)

"""Stage 3: training the leaves that stay continuous; the codes are frozen."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax, sharding

from pqf_jax.core import vq_array

PyTree = Any
Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]

LossFn = Callable[[PyTree, Batch], tuple[jax.Array, tuple[PyTree, Metrics]]]
"""(variables, batch) -> (loss, (updated collections, metrics)).

The updated collections, such as `{"batch_stats": ...}`, replace those of the
variables after the step; `{}` where nothing of the kind exists."""


class FinetuneState(NamedTuple):
  """All that a training step changes.

  Attributes:
    step: int32 [], steps taken.
    trainable: codebooks, stem, norm scale and bias, biases; None elsewhere.
    frozen: codes and norm statistics; None elsewhere.
    opt_state: of the optimizer, over `trainable` only.
  """

  step: jax.Array
  trainable: PyTree
  frozen: PyTree
  opt_state: optax.OptState


Step = Callable[[FinetuneState, Batch], tuple[FinetuneState, Metrics]]


def init_state(
  variables: PyTree,
  optimizer: optax.GradientTransformation,
  frozen: Sequence[str] = (),
) -> FinetuneState:
  """The state before the first step.

  Args:
    variables: with `VQArray`s, or dense (then every parameter is trained).
    optimizer: of the step that will be taken.
    frozen: patterns of the paths that stay as they are, besides codes and
      statistics.
  """

  def is_trainable(path: str, leaf: jax.Array) -> bool:
    kept = any(re.fullmatch(pattern, path) for pattern in frozen)
    return vq_array.in_params(path, leaf) and not kept

  trainable, rest = vq_array.split_trainable(variables, is_trainable)
  step = jnp.zeros((), jnp.int32)
  return FinetuneState(step, trainable, rest, optimizer.init(trainable))


def state_variables(state: FinetuneState) -> PyTree:
  """The variable tree of a state, as `model.apply` takes it."""
  return vq_array.merge_trainable(state.trainable, state.frozen)


def cosine_adam(
  *, learning_rate: float, final_learning_rate: float, num_steps: int
) -> optax.GradientTransformation:
  """Adam with a cosine schedule per step (section 4.1 of arXiv 2010.15703).

  Args:
    learning_rate: at step 0.
    final_learning_rate: at step `num_steps` and after.
    num_steps: length of the schedule.
  """
  schedule = optax.cosine_decay_schedule(
    learning_rate, num_steps, alpha=final_learning_rate / learning_rate
  )
  return optax.adam(schedule)


def make_finetune_step(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  *,
  mesh: sharding.Mesh | None = None,
  microbatches: int = 1,
) -> Step:
  """Makes the jitted step of equation 9 of arXiv 2010.15703.

  Args:
    loss_fn: see `LossFn`.
    optimizer: any optax transformation.
    mesh: devices that share every batch along the mesh's one axis. `loss_fn`
      then sees the rows of one device under `jax.shard_map`, and the step
      follows the mean of what all of them give; what depends on the whole
      batch, such as a norm's statistics, has to use the axis itself. The
      gradient of a codebook is summed on each device, and only then sent.
      None: `loss_fn` sees the whole batch; if it is spread over devices, they
      exchange gradients of the dense kernels.
    microbatches: the rows of a device are taken in so many parts, one after the
      other, of which the step follows the mean: less memory for activations.

  Returns:
    step(state, batch) -> (state, metrics); the state's buffers are donated.
    `metrics` holds `loss` and whatever `loss_fn` reports.
  """
  learn = functools.partial(_mean_of_parts, loss_fn, microbatches)
  if mesh is not None:
    learn = _mean_of_devices(learn, mesh)

  def step(state: FinetuneState, batch: Batch) -> tuple[FinetuneState, Metrics]:
    gradients, collections, metrics = learn(
      state.trainable, state.frozen, batch
    )
    updates, opt_state = optimizer.update(
      gradients, state.opt_state, state.trainable
    )
    trainable = optax.apply_updates(state.trainable, updates)
    frozen = {**state.frozen, **collections}
    new_state = FinetuneState(state.step + 1, trainable, frozen, opt_state)
    return new_state, metrics

  return jax.jit(step, donate_argnums=0)


Learned = tuple[PyTree, PyTree, Metrics]
"""Gradients, updated collections, and metrics with the loss."""


def _learn(
  loss_fn: LossFn, trainable: PyTree, frozen: PyTree, batch: Batch
) -> Learned:
  def loss_of(trainable: PyTree) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
    variables = vq_array.merge_trainable(trainable, frozen)
    loss, (collections, metrics) = loss_fn(variables, batch)
    return loss, (collections, {"loss": loss, **metrics})

  gradients, told = jax.grad(loss_of, has_aux=True)(trainable)
  return gradients, *told


def _mean_of_parts(
  loss_fn: LossFn,
  microbatches: int,
  trainable: PyTree,
  frozen: PyTree,
  batch: Batch,
) -> Learned:
  """What is learned of each part of the rows, one after the other."""
  learn = functools.partial(_learn, loss_fn, trainable, frozen)
  if microbatches == 1:  # a loop of one would take longer to compile
    return learn(batch)
  parts = jax.tree.map(
    lambda rows: rows.reshape(microbatches, -1, *rows.shape[1:]), batch
  )
  shapes = jax.eval_shape(learn, jax.tree.map(lambda rows: rows[0], parts))
  sums, _ = lax.scan(
    lambda sums, part: (jax.tree.map(jnp.add, sums, learn(part)), None),
    jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes),
    parts,
  )
  return jax.tree.map(lambda total: total / microbatches, sums)


def _mean_of_devices(
  learn: Callable[..., Learned], mesh: sharding.Mesh
) -> Callable[..., Learned]:
  """What is learned by each device of its rows, exchanged all at once."""
  axis = tuple(mesh.axis_names)
  whole, rows = sharding.PartitionSpec(), sharding.PartitionSpec(axis)
  return jax.shard_map(
    lambda *shares: lax.pmean(learn(*shares), axis),
    mesh=mesh,
    in_specs=(whole, whole, rows),
    out_specs=whole,
    # It would ask the loops of every network to tell what varies.
    check_vma=False,
  )

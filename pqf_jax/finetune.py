"""Stage 3: trains codebooks and the other continuous leaves, not the codes."""

import difflib
import functools
import math
import numbers
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax, sharding, tree_util

from pqf_jax import errors
from pqf_jax.core import modules, trees, vq_array
from pqf_jax.core import plan as plans

PyTree = Any
Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]

LossFn = Callable[
  [PyTree, Batch, jax.Array], tuple[jax.Array, tuple[PyTree, Metrics]]
]
"""(variables, batch, key) -> (loss, (updated collections, metrics)).

The key is another one in every step, device and microbatch, for dropout and
random samples. The updated collections, such as `{"batch_stats": ...}`, replace
those of the variables after the step; `{}` where the network updates none. Of
variables that are no dict, such as an NNX module, return all: what is not
trained of their floats is taken."""


class FinetuneState(NamedTuple):
  """Everything that a training step changes.

  Attributes:
    step: int32 [], steps taken.
    trainable: codebooks, stem, norm scale and bias, biases; None elsewhere.
    frozen: codes and norm statistics; None elsewhere.
    opt_state: state of the optimizer, over `trainable` only.
    average: moving average of all floats, None elsewhere; or None where
      nothing is averaged.
  """

  step: jax.Array
  trainable: PyTree
  frozen: PyTree
  opt_state: optax.OptState
  average: PyTree = None


class Step(Protocol):
  """A jitted training step; `lower` compiles it ahead of time."""

  def __call__(
    self, state: FinetuneState, batch: Batch, /
  ) -> tuple[FinetuneState, Metrics]:
    """Returns the state after the step, and its metrics."""

  def lower(self, state: Any, batch: Any, /) -> jax.stages.Lowered:
    """Traces the step for arguments of these shapes."""


def init_state(
  variables: PyTree,
  optimizer: optax.GradientTransformation,
  frozen: Sequence[str] = (),
  *,
  averaged: bool = False,
) -> FinetuneState:
  """Builds the state before the first step.

  Args:
    variables: a tree or module with `VQArray`s, or a dense one, of which every
      parameter is trained: see `vq_array.parameters_of`.
    optimizer: the one that the step will use.
    frozen: patterns (full-match regex) of paths that no step changes, besides
      codes and statistics. A `VQArray` has two: `<path>/codebook` and `codes`.
    averaged: whether the steps keep a moving average (their `ema_decay`).

  Raises:
    InputError: see `check_frozen`; a leaf is no array; or nothing is left to
      train.
  """
  trees.check_arrays("variables", variables)
  check_frozen(frozen, variables)

  is_parameter = vq_array.parameters_of(variables)

  def is_trainable(path: str, leaf: jax.Array) -> bool:
    kept = any(re.fullmatch(pattern, path) for pattern in frozen)
    return is_parameter(path, leaf) and not kept

  # A step donates the buffers of its state; the caller's must survive it.
  own = jax.tree.map(jnp.copy, modules.seal(variables))
  trainable, rest = vq_array.split_trainable(own, is_trainable)
  if not jax.tree.leaves(trainable):
    raise errors.InputError(
      f"no leaf is trained of {type(variables).__name__} with "
      f"{trees.sample_paths(variables)}; training takes floats that `frozen` "
      "does not match: of Linen's variables those under 'params/', of an NNX "
      "module those of nnx.Param"
    )
  step = jnp.zeros((), jnp.int32)
  average = jax.tree.map(jnp.copy, _floats(own)) if averaged else None
  return FinetuneState(
    step, trainable, rest, optimizer.init(trainable), average
  )


def check_frozen(patterns: Sequence[str], variables: PyTree) -> None:
  """Refuses patterns that match no path of the variables.

  Raises:
    InputError: names the pattern and paths that exist; or it is not a regular
      expression.
  """
  paths = trees.flatten(variables)
  for pattern in patterns:
    plans.check_pattern("frozen", pattern)
    if not any(re.fullmatch(pattern, path) for path in paths):
      near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0)
      raise errors.InputError(
        f"frozen has {pattern!r}, which matches no variable; fix or remove it "
        f"(variables with similar names: {near})"
      )


def state_variables(state: FinetuneState) -> PyTree:
  """Returns the variable tree of a state, as `model.apply` takes it.

  Its floats are the averages, where the state keeps them.
  """
  last = vq_array.fill(state.trainable, state.frozen)
  if state.average is not None:
    last = vq_array.fill(state.average, last)
  return modules.unseal(last)


def _floats(variables: PyTree) -> PyTree:
  """Returns the tree with None in the place of codes and other integers."""
  return jax.tree.map(
    lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else None,
    variables,
  )


# The settings that each optimizer has beyond its rates.
OPTIMIZERS: Mapping[str, tuple[str, ...]] = {
  "adam": (),
  "adamw": ("weight_decay",),
  "sgd": ("weight_decay", "momentum"),
}


def make_optimizer(
  name: str,
  *,
  learning_rate: float,
  final_learning_rate: float,
  num_steps: int,
  warmup_steps: int = 0,
  weight_decay: float = 0.0,
  momentum: float = 0.0,
) -> optax.GradientTransformation:
  """Builds an optimizer whose rate falls along a cosine, step by step.

  Args:
    name: a key of `OPTIMIZERS`.
    learning_rate: at the end of the warm-up.
    final_learning_rate: at step `num_steps` and after.
    num_steps: steps of the whole schedule, warm-up included.
    warmup_steps: steps in which the rate rises linearly from 0.
    weight_decay: of leaves of two axes or more: kernels and the codebooks of
      `VQArray`s, not norms and biases.
    momentum: of 'sgd'.

  Raises:
    InputError: an unknown optimizer, a setting that it does not have, or a
      value out of range.
  """
  _check_extras(name, weight_decay=weight_decay, momentum=momentum)
  if not 0 <= final_learning_rate <= learning_rate < math.inf or (
    learning_rate == 0
  ):
    raise errors.InputError(
      f"learning_rate is {learning_rate:g} and final_learning_rate "
      f"{final_learning_rate:g}; the first must be positive and the last not "
      "above it"
    )
  if num_steps < 1:
    raise errors.InputError(f"num_steps is {num_steps}; give 1 or more")
  if not 0 <= warmup_steps < num_steps:
    raise errors.InputError(
      f"the warm-up takes {warmup_steps} of {num_steps} steps; it must end "
      "before the training does"
    )
  if warmup_steps:
    schedule = optax.warmup_cosine_decay_schedule(
      0.0, learning_rate, warmup_steps, num_steps, final_learning_rate
    )
  else:
    schedule = optax.cosine_decay_schedule(
      learning_rate, num_steps, alpha=final_learning_rate / learning_rate
    )
  if name == "adam":
    return optax.adam(schedule)
  if name == "adamw":
    return optax.adamw(schedule, weight_decay=weight_decay, mask=_decayed)
  return optax.chain(
    optax.add_decayed_weights(weight_decay, mask=_decayed),
    optax.sgd(schedule, momentum=momentum or None),
  )


def cosine_adam(
  *, learning_rate: float, final_learning_rate: float, num_steps: int
) -> optax.GradientTransformation:
  """Builds the paper's optimizer (section 4.1 of arXiv 2010.15703).

  See `make_optimizer` for the arguments and errors.
  """
  return make_optimizer(
    "adam",
    learning_rate=learning_rate,
    final_learning_rate=final_learning_rate,
    num_steps=num_steps,
  )


def slow_down(
  optimizer: optax.GradientTransformation, paths: Collection[str], rate: float
) -> optax.GradientTransformation:
  """Returns the optimizer with shorter steps of some leaves.

  Args:
    optimizer: any.
    paths: of the leaves, as `trees.flatten` lists those of the variables.
    rate: share of their step that they take; 0: none.
  """

  def are_slow(trainable: PyTree) -> PyTree:
    return tree_util.tree_map_with_path(
      lambda key_path, leaf: trees.path_name(key_path) in paths, trainable
    )

  return optax.chain(optimizer, optax.masked(optax.scale(rate), are_slow))


def _check_extras(name: str, **extras: float) -> None:
  """Refuses an unknown optimizer, or settings that it does not have."""
  if name not in OPTIMIZERS:
    raise errors.InputError(
      f"optimizer is {name!r}; it must be one of {tuple(OPTIMIZERS)}"
    )
  for setting, value in extras.items():
    if value and setting not in OPTIMIZERS[name]:
      having = [n for n, known in OPTIMIZERS.items() if setting in known]
      raise errors.InputError(
        f"optimizer {name!r} has no {setting}, which is {value:g}; set it to 0 "
        f"or choose {' or '.join(map(repr, having))}"
      )
    if not 0 <= value < 1:
      raise errors.InputError(f"{setting} is {value:g}; give 0 <= value < 1")


def _decayed(trainable: PyTree) -> PyTree:
  """Marks the leaves that weight decay applies to."""
  return jax.tree.map(lambda leaf: leaf.ndim > 1, trainable)


Learned = tuple[PyTree, PyTree, Metrics]
"""Gradients, updated collections, and metrics with the loss."""


def make_finetune_step(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  *,
  key: jax.Array | None = None,
  mesh: sharding.Mesh | None = None,
  microbatches: int = 1,
  ema_decay: float = 0.0,
  after_update: Callable[[FinetuneState], FinetuneState] | None = None,
) -> Step:
  """Builds the jitted step of equation 9 of arXiv 2010.15703.

  Args:
    loss_fn: see `LossFn`.
    optimizer: any optax transformation.
    key: random number generator key of all steps: `loss_fn` gets one that is
      derived from it, the step, the device and the microbatch. None: the key of
      seed 0.
    mesh: devices that share every batch along the mesh's one axis. `loss_fn`
      then sees the rows of one device under `jax.shard_map`, and the step
      follows the mean over all devices; what depends on the whole batch, such
      as a norm's statistics, has to use the axis itself. The gradient of a
      codebook is summed on each device, and only then sent. None: `loss_fn`
      sees the whole batch; if it is spread over devices, they exchange
      gradients of the dense kernels.
    microbatches: parts into which a device cuts its rows; it takes them one
      after the other and the step follows their mean: less memory for
      activations.
    ema_decay: share of itself that the moving average of all floats keeps in a
      step, statistics included; in early steps less, (1 + step) / (10 + step).
      0 keeps none. The state then comes from `init_state(..., averaged=True)`.
    after_update: a pure function of the state that ends every step, inside the
      jitted program. It may replace any leaf by one of the same shape and type,
      frozen ones and codes included: re-assignment, averages of weights.

  Returns:
    step(state, batch) -> (state, metrics); the state's buffers are donated.
    `metrics` holds `loss` and whatever `loss_fn` reports.

  Raises:
    InputError: `microbatches` is not 1 or more, `ema_decay` not 0 <= value < 1;
      and from the step, the rows of a device cannot be cut into so many parts,
      `loss_fn` returns collections of another structure than the variables
      have, or the state has no average where `ema_decay` needs it.
  """
  if not isinstance(microbatches, numbers.Integral) or microbatches < 1:
    raise errors.InputError(
      f"microbatches is {microbatches!r}; give a whole number from 1 on"
    )
  if not 0 <= ema_decay < 1:
    raise errors.InputError(f"ema_decay is {ema_decay!r}; give 0 <= value < 1")
  learn: Callable[..., Learned] = functools.partial(
    _mean_of_parts, loss_fn, microbatches
  )
  if mesh is not None:
    learn = _mean_of_devices(learn, mesh)
  first_key = jax.random.key(0) if key is None else key
  # Bits on the host, since an array of one process cannot enter a program of
  # several.
  bits = np.asarray(jax.random.key_data(first_key))
  generator = jax.random.key_impl(first_key)

  def step(state: FinetuneState, batch: Batch) -> tuple[FinetuneState, Metrics]:
    first = jax.random.wrap_key_data(jnp.asarray(bits), impl=generator)
    gradients, updates, metrics = learn(
      state.trainable,
      state.frozen,
      batch,
      jax.random.fold_in(first, state.step),
    )
    moves, opt_state = optimizer.update(
      gradients, state.opt_state, state.trainable
    )
    trainable = optax.apply_updates(state.trainable, moves)
    frozen = _replace(state.frozen, updates)
    new_state = FinetuneState(
      state.step + 1, trainable, frozen, opt_state, state.average
    )
    new_state = (after_update or _unchanged)(new_state)
    return _averaged(new_state, ema_decay), metrics

  return jax.jit(step, donate_argnums=0)


def _updates(returned: PyTree, frozen: PyTree) -> PyTree:
  """Returns what `loss_fn` has updated, as `_replace` takes it.

  Raises:
    InputError: leaves are missing or new.
  """
  if isinstance(frozen, dict):
    for name, collection in returned.items():
      updated, before = map(trees.flatten, (collection, frozen.get(name)))
      different = updated.keys() ^ before.keys()
      _check_same(f"the collection {name!r}", different)
    return {name: modules.seal(returned[name]) for name in returned}
  if isinstance(returned, dict) and not returned:
    return {}
  before, updated = trees.flatten(_floats(frozen)), trees.flatten(returned)
  _check_same("variables", before.keys() - updated.keys())
  return jax.tree_util.tree_map_with_path(
    lambda key_path, _: updated[trees.path_name(key_path)], _floats(frozen)
  )


def _check_same(name: str, different: Collection[str]) -> None:
  if different:
    raise errors.InputError(
      f"loss_fn returns {name} with other leaves than the variables have "
      f"({', '.join(sorted(different)[:5])}); return all of it, or {{}} where "
      "none is updated"
    )


def _replace(frozen: PyTree, updates: PyTree) -> PyTree:
  """Returns the frozen leaves after a step."""
  if isinstance(updates, dict):
    return {**frozen, **updates} if updates else frozen
  return vq_array.fill(updates, frozen)


def _unchanged(state: FinetuneState) -> FinetuneState:
  return state


def _averaged(state: FinetuneState, decay: float) -> FinetuneState:
  """Moves the average of a state, after its step, towards its variables."""
  if bool(decay) != (state.average is not None):
    raise errors.InputError(
      f"ema_decay is {decay:g}, but the state has "
      f"{'no' if decay else 'an'} average; build it by "
      f"init_state(..., averaged={bool(decay)})"
    )
  if not decay:
    return state
  # The first steps leave the start behind, which is far from the end.
  kept = jnp.minimum(decay, state.step / (9.0 + state.step))
  last = vq_array.fill(state.trainable, state.frozen)

  def move(average: jax.Array, leaf: jax.Array) -> jax.Array:
    # In this form what never changes keeps its bits.
    step = (1 - kept) * (leaf - average).astype(jnp.float32)
    return average + step.astype(average.dtype)

  average = jax.tree.map(move, state.average, _floats(last))
  return state._replace(average=average)


def _learn(
  loss_fn: LossFn,
  trainable: PyTree,
  frozen: PyTree,
  batch: Batch,
  key: jax.Array,
) -> Learned:
  def loss_of(trainable: PyTree) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
    variables = vq_array.merge_trainable(trainable, frozen)
    loss, (returned, metrics) = loss_fn(variables, batch, key)
    updates = _updates(returned, frozen)
    return loss, (updates, {"loss": loss, **metrics})

  gradients, (updates, metrics) = jax.grad(loss_of, has_aux=True)(trainable)
  return gradients, updates, metrics


def _mean_of_parts(
  loss_fn: LossFn,
  microbatches: int,
  trainable: PyTree,
  frozen: PyTree,
  batch: Batch,
  key: jax.Array,
) -> Learned:
  """Returns the mean over the parts of the rows, taken one after the other."""
  learn = functools.partial(_learn, loss_fn, trainable, frozen)
  if microbatches == 1:  # a loop of one would take longer to compile
    return learn(batch, key)
  num_rows = {len(rows) for rows in jax.tree.leaves(batch)}
  if any(count % microbatches for count in num_rows):
    raise errors.InputError(
      f"a device has {sorted(num_rows)} rows of the batch, which cannot be cut "
      f"into microbatches={microbatches} equal parts; give a divisor"
    )
  parts = jax.tree.map(
    lambda rows: rows.reshape(microbatches, -1, *rows.shape[1:]), batch
  )
  keys = jax.random.split(key, microbatches)
  shapes = jax.eval_shape(
    learn, jax.tree.map(lambda rows: rows[0], parts), keys[0]
  )
  sums, _ = lax.scan(
    lambda sums, part: (jax.tree.map(jnp.add, sums, learn(*part)), None),
    jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes),
    (parts, keys),
  )
  return jax.tree.map(lambda total: total / microbatches, sums)


def _mean_of_devices(
  learn: Callable[..., Learned], mesh: sharding.Mesh
) -> Callable[..., Learned]:
  """Returns `learn` over the rows of all devices, exchanged all at once."""
  axis = tuple(mesh.axis_names)
  whole, rows = sharding.PartitionSpec(), sharding.PartitionSpec(axis)

  def learn_share(
    trainable: PyTree, frozen: PyTree, batch: Batch, key: jax.Array
  ) -> Learned:
    key = jax.random.fold_in(key, lax.axis_index(axis))
    return lax.pmean(learn(trainable, frozen, batch, key), axis)

  return jax.shard_map(
    learn_share,
    mesh=mesh,
    in_specs=(whole, whole, rows, whole),
    out_specs=whole,
    # It would ask the loops of every network to tell what varies.
    check_vma=False,
  )

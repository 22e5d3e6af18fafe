"""Compiles a recipe's programs for chips that are not there, and counts.

What `compress` runs on every chip: the fine-tuning step, an evaluation batch,
and the k-means of the most costly layer, which one chip does alone. The step is
`finetune.make_finetune_step` itself, with the shardings of `cluster`.
"""

import math
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from pqf_jax import errors, finetune, kmeans
from pqf_jax.core import plan as plans
from pqf_jax.core import trees
from pqf_jax.pipeline import job as jobs
from pqf_jax.preflight import costs, hardware, table
from pqf_jax.preflight import programs as rehearsals
from pqf_jax.runtime import distributed, progress

PyTree = Any
# Each takes a minute or two for a TPU.
MOST_COMPILATIONS = 5
# Long enough to remain a loop, short enough for its random numbers to be few,
# and for none of them to be transfers: their loop would be counted too.
LOOP_STEPS = 8


class Lowered(NamedTuple):
  """A program before the compiler, and how it is told of.

  Attributes:
    name: in the table.
    batch_size: images over all chips, or 0.
    stages: `jax.stages.Lowered` programs. The cost is that of the first; of
      three, the memory of the first, and the rest of the second less the third.
    detail: what it runs on, where that is no batch.
    dtype: of the inputs of its products.
  """

  name: str
  batch_size: int
  stages: tuple[Any, ...]
  detail: str = ""
  dtype: str = "float32"


def run(config: ml_collections.ConfigDict) -> None:
  """Prints what each chip of `config.topology` would need and do.

  Needs no data, no weights and no such chip. Call it before JAX has used any
  device.

  Raises:
    InputError: unknown topology, no libtpu, a batch that the chips cannot
      share, or one that does not fit into their memory.
  """
  target = hardware.parse(config.topology)
  jobs.check_choice("task", config.task, rehearsals.REHEARSALS)
  jobs.check_batches(config, ("finetune",), num_devices=target.num_chips)
  devices = hardware.open_devices(target)
  rehearsal = _Rehearsal(config, target, distributed.mesh(devices.sizing))
  trial = rehearsal.try_all()
  if devices.counting is not devices.sizing:
    counter = _Rehearsal(config, target, distributed.mesh(devices.counting))
    trial = list(map(_counted_by, trial, counter.try_all()))
  progress.show(table.render(target, trial, rehearsal.trained_bytes))
  for note in table.notes(target, devices):
    progress.say(note)
  for setting, entry, lower in (
    ("finetune.batch_size", trial[0], rehearsal.step),
    ("eval_batch_size", trial[1], rehearsal.evaluation),
  ):
    if entry.cost is None or entry.cost.hbm_bytes > target.chip.hbm_bytes:
      raise rehearsal.refusal(setting, entry, lower)
  progress.say(f"{config.topology}: everything fits")


class _Rehearsal:
  """The programs of one recipe on one mesh."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    target: hardware.Target,
    mesh: jax.sharding.Mesh,
  ):
    self._config, self._target, self._mesh = config, target, mesh
    module, self._template = jobs.build_model(config)
    self._plan = jobs.make_plan(config, self._template)
    self._parts = rehearsals.REHEARSALS[config.task](config, module)
    self._variables = plans.compressed_shapes(self._plan, self._template)
    self._optimizer = finetune.cosine_adam(
      learning_rate=config.finetune.learning_rate,
      final_learning_rate=config.finetune.final_learning_rate,
      num_steps=max(1, config.finetune.epochs) * 1000,  # only a constant in it
    )
    self._state = jax.eval_shape(
      lambda variables: finetune.init_state(
        variables, self._optimizer, self._config.frozen
      ),
      self._variables,
    )
    trained = jax.tree.leaves(self._state.trainable)
    self.trained_bytes = sum(x.size * x.dtype.itemsize for x in trained)

  def try_all(self) -> list[table.Entry]:
    """The three programs, at the batches of the recipe."""
    return self.compile(
      [
        self.step(self._config.finetune.batch_size),
        self.evaluation(self._config.eval_batch_size),
        self.kmeans(),
      ]
    )

  def step(self, batch_size: int) -> Lowered:
    """The fine-tuning step."""
    step = finetune.make_finetune_step(
      self._parts.loss_fn,
      self._optimizer,
      mesh=self._mesh,
      microbatches=self._config.finetune.microbatches,
    )
    lowered = step.lower(
      _placed(self._state, distributed.replicated(self._mesh)),
      _placed(
        self._parts.train_batch(batch_size), distributed.sharded(self._mesh)
      ),
    )
    return Lowered(
      "fine-tuning step", batch_size, (lowered,), dtype=self._config.dtype
    )

  def evaluation(self, batch_size: int) -> Lowered:
    """A batch of the evaluation."""
    lowered = jax.jit(self._parts.infer).lower(
      _placed(self._variables, distributed.replicated(self._mesh)),
      _placed(
        self._parts.eval_batch(batch_size), distributed.sharded(self._mesh)
      ),
    )
    return Lowered("evaluation step", batch_size, (lowered,))

  def kmeans(self) -> Lowered:
    """The k-means of the layer that takes longest, on one chip."""
    cost = plans.kmeans_cost(self._plan, self._template)
    path = max(cost, key=cost.__getitem__)
    layer = self._plan[path]
    shape = trees.flatten(self._template)[path].shape
    c_out, m, length = layer.spec.layout(shape)
    device = self._mesh.devices.flat[0]

    def lower(num_steps: int) -> Any:
      function = jax.jit(
        lambda keys, vectors: kmeans.kmeans_of_layers(
          keys, [vectors], num_codes=layer.num_codes, num_steps=num_steps
        )
      )
      keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
      return function.lower(
        *_placed(
          (
            keys,
            jax.ShapeDtypeStruct((c_out * m, length), jnp.float32),
          ),
          jax.sharding.SingleDeviceSharding(device),
        )
      )

    # A loop's body counts once: what it adds is one iteration.
    stages = tuple(map(lower, (layer.kmeans_steps, LOOP_STEPS, 0)))
    detail = f"N={c_out * m} D={length} K={layer.num_codes}"
    return Lowered("k-means iteration", 0, stages, detail)

  def compile(self, programs: list[Lowered]) -> list[table.Entry]:
    """Compiles them, and says how long it took."""
    start = time.perf_counter()
    progress.say(
      f"compiling for {self._target.num_chips} chips of "
      f"{self._config.topology}: {', '.join(p.name for p in programs)}"
    )
    # libtpu 0.0.42 crashed twice for v6e:4x4, in three threads at a time.
    num_threads = 1 if self._target.is_tpu else len(programs)
    with futures.ThreadPoolExecutor(num_threads) as pool:
      entries = list(pool.map(_compile, programs))
    progress.say(f"compiled in {time.perf_counter() - start:.0f} s")
    return entries

  def refusal(
    self,
    setting: str,
    entry: table.Entry,
    lower: Callable[[int], Lowered],
  ) -> errors.InputError:
    """What to tell the user of a batch that does not fit."""
    limit = self._target.chip.hbm_bytes
    parts = self._config.finetune.microbatches

    def needed_bytes(batch_size: int) -> float:
      (found,) = self.compile([lower(batch_size)])
      refused = found.cost is None and found.hbm_bytes <= limit
      return 0 if refused else found.hbm_bytes

    fits, fails = search_largest(
      needed_bytes,
      entry.batch_size,
      entry.hbm_bytes,
      limit=limit,
      least=self.trained_bytes,
      unit=self._target.num_chips * parts,
    )
    needed = (
      f"{table.size(entry.hbm_bytes)} of memory a chip"
      if entry.hbm_bytes
      else "more memory than a chip has"
    )
    advice = f"the largest that fits is {fits}"
    if fails - fits > self._target.num_chips * parts:
      advice = f"{fits} fits, {fails} does not, between them was not tried"
    if not fits:
      advice = "not even one image a chip fits; take smaller images"
    return errors.InputError(
      f"config.{setting}={entry.batch_size} needs {needed}, where a chip of "
      f"{self._target.topology} has {table.size(limit)}; {advice}"
    )


def search_largest(
  needed: Callable[[int], float],
  batch_size: int,
  batch_bytes: float,
  *,
  limit: float,
  least: float,
  unit: int,
) -> tuple[int, int]:
  """The largest batch that fits, in few trials.

  Memory is nearly a line in the batch, so each trial lies where the line
  through the last two meets the limit, or halfway where two are not known.

  Args:
    needed: batch -> its bytes; 0 where it does not fit and no size is told.
    batch_size: one that does not fit.
    batch_bytes: what it needs, or 0.
    limit: bytes that there are.
    least: bytes needed without any image.
    unit: batches are multiples of it.

  Returns:
    (largest batch seen to fit or 0, smallest seen not to).
  """
  low, high = 0, batch_size // unit
  known = [(0, least)]
  if batch_bytes:
    known.append((high, batch_bytes))
  for _ in range(MOST_COMPILATIONS):
    if high - low <= 1:
      break
    middle = (low + high) // 2
    if len(known) > 1 and known[-1][1] != known[-2][1]:
      (x0, y0), (x1, y1) = known[-2:]
      middle = x0 + math.floor((limit - y0) * (x1 - x0) / (y1 - y0))
      middle = min(high - 1, max(low + 1, middle))
    middle_bytes = needed(middle * unit)
    if middle_bytes:
      known.append((middle, middle_bytes))
    if 0 < middle_bytes <= limit:
      low = middle
    else:
      high = middle
  return low * unit, high * unit


def _compile(program: Lowered) -> table.Entry:
  named = program.name, program.batch_size, program.detail, program.dtype
  try:
    found = [costs.measure(lowered.compile()) for lowered in program.stages]
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    needed = costs.needed_bytes(str(error))
    return table.Entry(*named, needed, None)
  cost = found[0]
  if len(found) == 3:
    _, looped, without = found
    cost = cost._replace(
      flops=looped.flops - without.flops,
      moved_bytes=looped.moved_bytes - without.moved_bytes,
    )
  return table.Entry(*named, cost.hbm_bytes, cost)


def _counted_by(entry: table.Entry, other: table.Entry) -> table.Entry:
  """The entry with FLOPs and traffic of another compiler."""
  if entry.cost is None or other.cost is None:
    return entry
  cost = entry.cost._replace(
    flops=other.cost.flops, moved_bytes=other.cost.moved_bytes
  )
  return entry._replace(cost=cost)


def _placed(tree: PyTree, sharding: jax.sharding.Sharding) -> PyTree:
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    tree,
  )

"""Lowers and compiles the programs of a recipe for hardware that is not here.

They are those that every chip runs: the fine-tuning step, an evaluation batch,
and the k-means of the most costly layer, which one chip runs alone. The step is
`finetune.make_finetune_step` itself, with the shardings of `distributed`.
"""

import time
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from pqf_jax import finetune, kmeans, tasks
from pqf_jax.core import plan as plans
from pqf_jax.core import trees
from pqf_jax.pipeline import job as jobs
from pqf_jax.pipeline import planning, training
from pqf_jax.preflight import costs, hardware, table
from pqf_jax.runtime import distributed, progress

PyTree = Any
# Long enough to remain a loop, short enough for its random numbers to be few,
# and for no step to be a Hartigan step: their loop would be counted too.
LOOP_STEPS = 8
# Steps of an epoch, which a preflight does not know: a constant of the program.
STEPS_PER_EPOCH = 1000


class Lowered(NamedTuple):
  """A program before the compiler, and its column in the table.

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
  stages: tuple[jax.stages.Lowered, ...]
  detail: str = ""
  dtype: str = "float32"


class Programs:
  """The programs of one recipe on one mesh."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    target: hardware.Target,
    mesh: jax.sharding.Mesh,
  ):
    self._config, self._target, self._mesh = config, target, mesh
    network, self._template = jobs.build_network(config)
    self._plan = planning.make_plan(config, network, self._template)
    task = tasks.get(config.task)
    task.check(config, network, self._template, num_devices=target.num_chips)
    self._abstract = task.abstract_programs(config, network)
    self._variables = plans.compressed_shapes(self._plan, self._template)
    settings = config.finetune.copy_and_resolve_references()
    settings.epochs = max(1, settings.epochs)
    num_train = STEPS_PER_EPOCH * settings.batch_size
    self._optimizer = training.Schedule(settings, num_train, 0).make_optimizer()
    self._state = jax.eval_shape(
      lambda variables: finetune.init_state(
        variables,
        self._optimizer,
        self._config.frozen,
        averaged=bool(self._config.finetune.ema_decay),
      ),
      self._variables,
    )
    trained = jax.tree.leaves(self._state.trainable)
    self.trained_bytes = sum(x.size * x.dtype.itemsize for x in trained)

  def try_all(self) -> list[table.Entry]:
    """Compiles the three programs, at the batches of the recipe."""
    return self.compile(
      [
        self.step(self._config.finetune.batch_size),
        self.evaluation(self._config.eval_batch_size),
        self.kmeans(),
      ]
    )

  def step(self, batch_size: int) -> Lowered:
    """Lowers the fine-tuning step."""
    step = finetune.make_finetune_step(
      self._abstract.loss_fn,
      self._optimizer,
      mesh=self._mesh,
      microbatches=self._config.finetune.microbatches,
      ema_decay=self._config.finetune.ema_decay,
    )
    lowered = step.lower(
      _placed(self._state, distributed.replicated(self._mesh)),
      _placed(
        self._abstract.train_batch(batch_size), distributed.sharded(self._mesh)
      ),
    )
    return Lowered(
      "fine-tuning step", batch_size, (lowered,), dtype=self._config.dtype
    )

  def evaluation(self, batch_size: int) -> Lowered:
    """Lowers the evaluation of a batch."""
    lowered = jax.jit(self._abstract.infer).lower(
      _placed(self._variables, distributed.replicated(self._mesh)),
      _placed(
        self._abstract.eval_batch(batch_size), distributed.sharded(self._mesh)
      ),
    )
    return Lowered("evaluation step", batch_size, (lowered,))

  def kmeans(self) -> Lowered:
    """Lowers the k-means of the most costly layer, on one chip."""
    cost = plans.kmeans_cost(self._plan, self._template)
    path = max(cost, key=cost.__getitem__)
    layer = self._plan[path]
    shape = trees.flatten(self._template)[path].shape
    c_out, m, length = layer.spec.layout(layer.spec.layer_shape(shape))
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
    """Compiles programs, and prints how long that takes."""
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


def _compile(program: Lowered) -> table.Entry:
  named = program.name, program.batch_size, program.detail, program.dtype
  try:
    measured = [costs.measure(lowered.compile()) for lowered in program.stages]
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    needed = costs.needed_bytes(str(error))
    return table.Entry(*named, needed, None)
  cost = measured[0]
  if len(measured) == 3:
    _, looped, without = measured
    cost = cost._replace(
      flops=looped.flops - without.flops,
      moved_bytes=looped.moved_bytes - without.moved_bytes,
    )
  return table.Entry(*named, cost.hbm_bytes, cost)


def counted_by(entry: table.Entry, other: table.Entry) -> table.Entry:
  """Returns the entry with FLOPs and traffic of another compiler."""
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

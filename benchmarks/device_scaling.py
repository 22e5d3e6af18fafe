"""Measures the same work on one device of this machine and on all of them.

    python -m benchmarks.device_scaling [--depth 50] [--per_device 64]

Fine-tuning step: a ResNet with random weights, the recipe's kernels as codebook
+ codes. Each device gets the same number of images, so on a perfect machine the
time does not depend on the number of devices. `batch` and `device`: norms take
statistics from all devices or from their own; `dense` is the step of
`mesh=None`, in which XLA exchanges the gradients of whole kernels. Memory: by
the compiler, and the most that one device ever held. K-means: one layer on one
device and divided among all; codes must be equal bit for bit. Medians of
--repeats.
"""

import argparse
import statistics
import time
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from configs import resnet18, resnet50
from pqf_jax import data, finetune, kmeans, models
from pqf_jax.core import plan as plans
from pqf_jax.preflight import costs
from pqf_jax.runtime import distributed
from pqf_jax.tasks import classification

RECIPES = {18: resnet18, 50: resnet50}
LAYERS = ((262_144, 9, 256), (4_194_304, 9, 256))


def main() -> None:
  """Prints a row for each program and layer."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--depth", type=int, default=50)
  parser.add_argument("--side", type=int, default=224, help="pixels")
  parser.add_argument("--per_device", type=int, default=64, help="images")
  parser.add_argument("--repeats", type=int, default=20)
  parser.add_argument("--kmeans_steps", type=int, default=100, help="0: none")
  options = parser.parse_args()
  devices = jax.devices()
  print(f"jax {jax.__version__}, {len(devices)} x {devices[0].device_kind}")
  config = RECIPES[options.depth].get_config("imagenet2012")
  _time_steps(config, options)
  for layer in LAYERS if options.kmeans_steps else ():
    _time_kmeans(layer, options)


def _time_steps(
  config: ml_collections.ConfigDict, options: argparse.Namespace
) -> None:
  devices = jax.devices()
  programs = {}
  for dtype in ("float32", "bfloat16"):
    programs[f"1 {dtype}"] = devices[:1], "batch", dtype
    for norms in ("batch", "device", "dense") if len(devices) > 1 else ():
      programs[f"{len(devices)} {dtype} {norms}"] = devices, norms, dtype
  with futures.ThreadPoolExecutor() as pool:
    built = {
      name: pool.submit(_build, config, options, *program)
      for name, program in programs.items()
    }
  print(
    "| devices | ms a step | images/s | to 1 | all-reduces | largest | all |"
  )
  first = 0.0
  for name, (used, *_) in programs.items():
    compiled, state, batch, cost = built[name].result()
    seconds = []
    for _ in range(options.repeats + 2):
      start = time.perf_counter()
      state, metrics = jax.block_until_ready(compiled(state, batch))
      seconds.append(time.perf_counter() - start)
    typical = statistics.median(seconds[2:])
    first = typical if len(used) == 1 else first
    sizes = [collective.num_bytes for collective in cost.collectives]
    print(
      f"| {name} | {1e3 * typical:.2f} | "
      f"{len(used) * options.per_device / typical:.0f} | "
      f"{typical / first:.3f} | {len(sizes)} | "
      f"{max(sizes, default=0):,} | {sum(sizes):,} | "
      f"loss {float(metrics['loss']):.6f}",
      flush=True,
    )
    peak = (used[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    print(
      f"  memory of a device: {cost.hbm_bytes:,.0f} B by the compiler, at most "
      f"{peak:,} B held so far",
      flush=True,
    )


def _build(
  config: ml_collections.ConfigDict,
  options: argparse.Namespace,
  devices: list[jax.Device],
  norms: str,
  dtype: str,
) -> tuple[Any, Any, Any, costs.Cost]:
  """Returns (compiled step, state, batch, cost)."""
  mesh = distributed.mesh(tuple(devices))
  arguments = dict(config.model)
  model = models.get_model(arguments.pop("name")).make(**arguments)
  template = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3))
  )
  plan = plans.make_plan([plans.Rule(*rule) for rule in config.rules], template)
  optimizer = finetune.cosine_adam(
    learning_rate=1e-3, final_learning_rate=1e-6, num_steps=1000
  )
  axis = distributed.AXIS if norms == "batch" else None
  step = finetune.make_finetune_step(
    classification.make_loss(
      model.clone(norm_axis=axis, dtype=jnp.dtype(dtype)).apply,
      lambda images: data.normalize(images, mean=(0.5,) * 3, std=(0.25,) * 3),
    ),
    optimizer,
    mesh=None if norms == "dense" else mesh,
  )
  draw = np.random.default_rng(0)

  def fill(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    if jnp.issubdtype(leaf.dtype, jnp.integer):  # codes
      return draw.integers(0, 128, leaf.shape, leaf.dtype)
    return draw.uniform(0.01, 0.03, leaf.shape).astype(leaf.dtype)

  state = finetune.init_state(
    jax.tree.map(fill, plans.compressed_shapes(plan, template)), optimizer
  )
  size = len(devices) * options.per_device
  images = draw.integers(
    0, 256, (size, options.side, options.side, 3), np.uint8
  )
  batch = {"image": images, "label": np.arange(size, dtype=np.int32)}
  state = jax.device_put(
    jax.tree.map(np.asarray, state), distributed.replicated(mesh)
  )
  batch = jax.device_put(batch, distributed.sharded(mesh))
  start = time.perf_counter()
  compiled = step.lower(state, batch).compile()
  print(f"  compiled in {time.perf_counter() - start:.1f} s", flush=True)
  return compiled, state, batch, costs.measure(compiled)


def _time_kmeans(
  layer: tuple[int, int, int], options: argparse.Namespace
) -> None:
  count, length, num_codes = layer
  vectors = np.random.default_rng(1).normal(size=(count, length))
  vectors = vectors.astype(np.float32)
  devices = jax.devices()
  results, seconds = [], []
  for used in ((), devices[:1], devices):
    mesh = distributed.mesh(tuple(used)) if used else None
    place = distributed.sharded(mesh) if used else devices[0]
    placed = jax.device_put(vectors, place)
    for _ in range(4):
      start = time.perf_counter()
      (result,) = jax.block_until_ready(
        kmeans.kmeans_of_layers(
          jax.random.split(jax.random.key(0), 1),
          [placed],
          num_codes=num_codes,
          num_steps=options.kmeans_steps,
          mesh=mesh,
        )
      )
      seconds.append(time.perf_counter() - start)
    results.append(jax.device_get((result.codes, result.codebook)))
  each = [statistics.median(seconds[i + 1 : i + 4]) for i in (0, 4, 8)]
  equal = [
    all((a == b).all() for a, b in zip(results[0], other, strict=True))
    for other in results[1:]
  ]
  print(
    f"k-means N={count} D={length} K={num_codes}, us an iteration: alone "
    f"{1e6 * each[0] / options.kmeans_steps:.0f}, mesh of 1 "
    f"{1e6 * each[1] / options.kmeans_steps:.0f}, mesh of {len(devices)} "
    f"{1e6 * each[2] / options.kmeans_steps:.0f}; codes and codebook equal to "
    f"the first: {equal}",
    flush=True,
  )


if __name__ == "__main__":
  main()

"""Measures the fine-tuning step over host devices and counts collectives.

    python -m benchmarks.scaling [--devices 1,2,4,8] [--per_device 4]

Each device gets the same number of images of ResNet-18 (CIFAR stem, random
weights, the recipe's kernels as codebook + codes), so on a perfect machine the
time does not depend on the number of devices. But host devices share the cores
of this machine: with C cores N > C devices take at least N / C times as long.
So it prints two ratios: to one device with as many images in all, which is the
cost of dividing and exchanging, and to one device with its share of them. Each
number of devices runs in a process of its own; medians of --repeats steps.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time


def main() -> None:
  """Prints a row for each number of devices."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--devices", default="1,2,4,8")
  parser.add_argument("--per_device", type=int, default=4, help="images")
  parser.add_argument("--repeats", type=int, default=7)
  parser.add_argument(
    "--run", default="", help="devices,batch; for the script itself"
  )
  options = parser.parse_args()
  if options.run:
    num_devices, batch_size = map(int, options.run.split(","))
    print(json.dumps(_measure(num_devices, batch_size, options.repeats)))
    return

  print(f"{os.cpu_count()} CPU cores, {options.per_device} images a device")
  print(
    "| devices | batch | ms a step | one device, same batch | ratio | "
    "to 1 device | all-reduces | bytes | largest |"
  )
  print("|---|---|---|---|---|---|---|---|---|")
  first = 0.0
  for num_devices in map(int, options.devices.split(",")):
    batch_size = num_devices * options.per_device
    many = _in_process(num_devices, batch_size, options.repeats)
    one = _in_process(1, batch_size, options.repeats)
    first = first or many["seconds"]
    print(
      f"| {num_devices} | {batch_size} | {1e3 * many['seconds']:.0f} | "
      f"{1e3 * one['seconds']:.0f} | {many['seconds'] / one['seconds']:.2f} | "
      f"{many['seconds'] / first:.2f} | {many['count']} | {many['bytes']:,} | "
      f"{many['largest']:,} |"
    )


def _in_process(num_devices: int, batch_size: int, repeats: int) -> dict:
  flag = f"--xla_force_host_platform_device_count={num_devices}"
  process = subprocess.run(
    [
      sys.executable,
      "-m",
      "benchmarks.scaling",
      f"--run={num_devices},{batch_size}",
      f"--repeats={repeats}",
    ],
    env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag},
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return json.loads(process.stdout.splitlines()[-1])


def _measure(num_devices: int, batch_size: int, repeats: int) -> dict:
  import jax
  import jax.numpy as jnp

  from configs import resnet18
  from pqf_jax import data, finetune, models, quantize
  from pqf_jax.core import plan as plans
  from pqf_jax.preflight import costs
  from pqf_jax.runtime import distributed
  from pqf_jax.tasks import classification

  if jax.device_count() != num_devices:
    raise RuntimeError(f"{jax.device_count()} devices, not {num_devices}")
  config = resnet18.get_config("cifar10")
  arguments = dict(config.model)
  model = models.get_model(arguments.pop("name")).make(**arguments)
  images = jnp.zeros((1, 32, 32, 3))
  dense = jax.jit(model.init)(jax.random.key(0), images)
  # Any codes will do, so k-means takes two steps.
  plan = plans.make_plan(
    [plans.Rule(*rule[:3], 2) for rule in config.rules], dense
  )
  variables, _ = quantize.quantize_params(jax.random.key(1), dense, plan)
  optimizer = finetune.cosine_adam(
    learning_rate=1e-3, final_learning_rate=1e-6, num_steps=1000
  )

  def preprocess(images: jax.Array) -> jax.Array:
    return data.normalize(images, mean=(0.5,) * 3, std=(0.25,) * 3)

  step = finetune.make_finetune_step(
    classification.make_loss(
      model.clone(norm_axis=distributed.AXIS).apply, preprocess
    ),
    optimizer,
    mesh=distributed.mesh(),
  )
  # Copied, because the step donates its buffers.
  state = distributed.replicate(
    jax.tree.map(jnp.array, finetune.init_state(variables, optimizer))
  )
  batch = distributed.shard(
    {
      "image": jnp.zeros((batch_size, 32, 32, 3), jnp.uint8),
      "label": jnp.arange(batch_size, dtype=jnp.int32) % 10,
    }
  )
  compiled = step.lower(state, batch).compile()
  sizes = [
    collective.num_bytes
    for collective in costs.find_collectives(compiled.as_text())
  ]
  seconds = []
  for _ in range(repeats + 1):
    start = time.perf_counter()
    state, metrics = jax.block_until_ready(compiled(state, batch))
    seconds.append(time.perf_counter() - start)
  del metrics
  return {
    "seconds": statistics.median(seconds[1:]),  # the first one warms up
    "count": len(sizes),
    "bytes": sum(sizes),
    "largest": max(sizes, default=0),
  }


if __name__ == "__main__":
  main()

"""Seconds to quantize an attention block: 1,024 features, 16 heads, K = 256.

    python -m benchmarks.attention [--channels 4 8 16] [--steps 50]

Linen's `MultiHeadDotProductAttention`, four kernels of 1,048,576 weights, drawn
at random. Each row is a process of its own, so that its seconds hold all that a
user waits for once JAX is imported: `find_kernels`, the plan, compilation and
k-means. CPU seconds are those of all threads.
"""

import argparse
import multiprocessing
import time
from typing import Any

FEATURES, HEADS, CODES = 1024, 16, 256


def quantize(channels: int, steps: int) -> str:
  """Quantizes the block and returns its row."""
  # In the new process, so that each compiles for itself.
  import jax
  from flax import linen as nn

  import pqf_jax
  from pqf_jax.runtime import xla_flags

  xla_flags.set_defaults()
  network = nn.MultiHeadDotProductAttention(HEADS)
  inputs = jax.ShapeDtypeStruct((1, 8, FEATURES), "float32")
  zeros = jax.numpy.zeros(inputs.shape)
  variables = jax.block_until_ready(network.init(jax.random.key(0), zeros))

  wall, cpu = time.perf_counter(), time.process_time()
  kernels = pqf_jax.find_kernels(network.apply, variables, inputs)
  rules = [pqf_jax.Rule(".*", CODES, channels, steps)]
  plan = pqf_jax.make_plan(rules, variables, kernels)
  made: Any = pqf_jax.quantize_params(jax.random.key(1), variables, plan)
  jax.block_until_ready(made[0])
  wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
  lost = sum(layer.distortion for layer in made[1].values()) / len(made[1])
  return f"| {channels} | {wall:.1f} | {cpu:.1f} | {lost:.3f} |"


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--channels", nargs="*", type=int, default=[4, 8, 16])
  parser.add_argument("--steps", type=int, default=50)
  options = parser.parse_args()
  print("| channels | seconds | CPU seconds | distortion |")
  print("|---|---|---|---|")
  context = multiprocessing.get_context("spawn")
  for channels in options.channels:
    with context.Pool(1) as pool:
      print(pool.apply(quantize, (channels, options.steps)), flush=True)


if __name__ == "__main__":
  main()

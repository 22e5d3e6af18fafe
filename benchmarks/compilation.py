"""What k-means compiles, and what that takes with and without kept programs.

    python -m benchmarks.compilation

For the kernels of ResNet-18 and ResNet-50, small blocks, random weights, four
steps, each row in a process of its own: without kept programs, with an empty
folder for them, and with the same folder again. Seconds are those of
`quantize_params`; programs are those that it needs, and those found in the
folder. Prints Markdown.
"""

from __future__ import annotations

import collections
import concurrent.futures
import multiprocessing
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import monitoring

from configs import resnet18, resnet50
from pqf_jax import quantize
from pqf_jax.core import plan as plans
from pqf_jax.models import resnet
from pqf_jax.runtime import compilation

PyTree = Any

_RECIPES = {18: resnet18, 50: resnet50}
_NEEDED = "/jax/core/compile/backend_compile_duration"
_FOUND = "/jax/compilation_cache/cache_hits"
_STEPS = 4
_MEGABYTES = 1000


def main() -> None:
  """Prints the table."""
  print("| network | kept programs | CPU s | s | programs | found |")
  print("|---|---|---|---|---|---|")
  for depth in _RECIPES:
    with tempfile.TemporaryDirectory() as folder:
      for name, place in (
        ("off", compilation.OFF),
        ("none yet", folder),
        ("all", folder),
      ):
        with concurrent.futures.ProcessPoolExecutor(
          1, mp_context=multiprocessing.get_context("spawn")
        ) as pool:
          figures = pool.submit(_measure, depth, place).result()
        print(f"| ResNet-{depth} | {name} | {figures} |", flush=True)


def _measure(depth: int, place: str) -> str:
  """Returns the figures of a row."""
  compilation.keep_programs(place, _MEGABYTES)
  heard: collections.Counter[str] = collections.Counter()
  monitoring.register_event_listener(lambda event, **_: heard.update([event]))
  monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: heard.update([event])
  )
  variables, plan = _network(depth)
  key = jax.block_until_ready(jax.random.key(0))
  heard.clear()
  cpu, wall = time.process_time(), time.perf_counter()
  quantize.quantize_params(key, variables, plan)
  cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
  return f"{cpu:.1f} | {wall:.1f} | {heard[_NEEDED]} | {heard[_FOUND]}"


def _network(depth: int) -> tuple[PyTree, plans.CompressionPlan]:
  model = resnet.make(depth=depth, num_classes=1000)
  template = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3))
  )
  draws = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda leaf: draws.standard_normal(leaf.shape, np.float32), template
  )
  config = _RECIPES[depth].get_config("imagenet2012")
  rules = [plans.Rule(*rule[:3], _STEPS) for rule in config.rules]
  return variables, plans.make_plan(rules, variables)


if __name__ == "__main__":
  main()

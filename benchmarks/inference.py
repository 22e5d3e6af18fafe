"""Memory and latency of the forms in which a compressed network is applied.

    python -m benchmarks.inference
    python -m benchmarks.inference --products --networks resnet50 --batches 1 8

Table 1: one product, processor ms of the dense kernel / by tables / by blocks.

Then a table a network. mlp: three layers of 4,096 x 4,096, D = 8, K = 256.
vit_b: ViT-B/16 of Linen's layers (benchmarks/transformers.py), D = 8, K = 256,
the patches' kernel dense. Others: modules of configs/, with the blocks of their
recipe for ImageNet. Images have 224 x 224 pixels. Codes and codebooks are drawn
at random. Columns:

- MB: of the variables that a call takes;
- compile s: of the first batch, in processor seconds;
- at each batch the time of a call by the wall and of all processors, medians of
  --repeats rounds in which the forms take turns of a few calls, and the
  temporary memory.

`as loaded` is the network's own function, compiled, with the variables as
`pqf_jax.load` returns them. Below the table stands what `layer` holds at each
batch, variables and temporary memory, and next to it the packed file + 1.2 x
the largest kernel + the temporary memory of dense kernels.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pqf_jax
from benchmarks import transformers
from pqf_jax import inference
from pqf_jax.core import plan as plans
from pqf_jax.core import trees, vq_array
from pqf_jax.inference import products
from pqf_jax.pipeline import job as jobs
from pqf_jax.pipeline import planning

PyTree = Any

_CALLS = 3  # one after the other, of a form whose turn it is


_PRODUCTS = (
  "4096,4096,8,256",
  "4096,4096,4,256",
  "4096,4096,16,1024",
  "4096,4096,8,4096",
  "768,3072,8,256",
)


class Network(NamedTuple):
  """A network to measure.

  Attributes:
    apply_fn: (variables, inputs) -> outputs.
    variables: with compressed kernels.
    sample: the shape of one input.
    plan: which kernels are compressed, and how.
  """

  apply_fn: Callable[[PyTree, jax.Array], jax.Array]
  variables: PyTree
  sample: tuple[int, ...]
  plan: plans.CompressionPlan


def main() -> None:
  """Prints a table for each network."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument(
    "--products", nargs="*", default=_PRODUCTS, help="C_in,C_out,D,K ..."
  )
  parser.add_argument("--networks", nargs="*", default=["mlp", "resnet50"])
  parser.add_argument("--batches", nargs="*", type=int, default=[1, 8, 64])
  parser.add_argument("--repeats", type=int, default=11)
  options = parser.parse_args()
  print(jax.devices()[0].device_kind)
  _print_products(options.products, options.batches, options.repeats)
  for name in options.networks:
    made = {"mlp": _mlp, "vit_b": _vit}.get(name)
    network = made() if made else _from_recipe(name)
    _print_table(name, network, options.batches, options.repeats)


def _print_products(
  shapes: list[str], batches: list[int], repeats: int
) -> None:
  print("\n| C_in, C_out, D, K |", *(f"{batch} rows |" for batch in batches))
  print("|---" * (1 + len(batches)) + "|")
  rng = np.random.default_rng(0)
  for shape in shapes:
    c_in, c_out, length, num_codes = map(int, shape.split(","))
    codes = rng.integers(0, num_codes, (c_in // length, c_out))
    codebook = rng.standard_normal((num_codes, length), np.float32)
    dense = jnp.array(codebook[codes].transpose(0, 2, 1).reshape(c_in, c_out))
    joined = products.join_codes(codes, num_codes)
    cells = []
    for batch in batches:
      x = jnp.ones((batch, c_in))
      calls = {"dense": _compile(jnp.matmul, x, dense)}
      for name, crossover in (("tables", batch), ("blocks", 0)):
        calls[name] = _compile(
          functools.partial(products.product_of_joined, crossover=crossover),
          *(x, jnp.array(codebook), joined),
        )
      times = _milliseconds(calls, repeats).values()
      cells.append(" / ".join(f"{used:.2f}" for _, used in times))
    print("| " + " | ".join([shape, *cells]) + " |", flush=True)


def _compile(
  function: Callable[..., jax.Array], *arguments: PyTree
) -> Callable[[], jax.Array]:
  compiled = jax.jit(function).lower(*arguments).compile()
  return lambda: compiled(*arguments)


def _print_table(
  name: str, network: Network, batches: list[int], repeats: int
) -> None:
  forms = _forms(network)
  cells = {form: [f"{_bytes(v) / 1e6:.1f}"] for form, (_, v) in forms.items()}
  held = []
  for batch in batches:
    inputs = jnp.ones((batch, *network.sample))
    calls: dict[str, Callable[[], jax.Array]] = {}
    temporary: dict[str, int] = {}
    for form, (apply_fn, variables) in forms.items():
      start = time.process_time()
      compiled = jax.jit(apply_fn).lower(variables, inputs).compile()
      if batch == batches[0]:
        cells[form].append(f"{time.process_time() - start:.1f}")
      temporary[form] = compiled.memory_analysis().temp_size_in_bytes
      cells[form].append(f"{temporary[form] / 1e6:.1f}")
      calls[form] = lambda run=compiled, v=variables, x=inputs: run(v, x)
    for form, (wall, used) in _milliseconds(calls, repeats).items():
      cells[form].insert(-1, f"{wall:.2f} / {used:.2f}")
    layer = _bytes(forms["layer"].variables) + temporary["layer"]
    bound = _least_bytes(network) + temporary["dense float32"]
    held.append(f"{batch}: {layer / 1e6:.1f} and {bound / 1e6:.1f} MB")
  print(f"\n| {name} | MB | compile s |", end="")
  for batch in batches:
    print(f" batch {batch}: wall / processor ms | temporary MB |", end="")
  print("\n" + "|---" * (3 + 2 * len(batches)) + "|")
  for form, row in cells.items():
    print("| " + " | ".join([form, *row]) + " |", flush=True)
  print("\nlayer holds at batch", ", ".join(held), flush=True)


def _least_bytes(network: Network) -> float:
  """Returns the bytes of the packed file, and 1.2 times the largest kernel."""
  leaves = trees.flatten(network.variables, vq_array.is_vq)
  size = plans.predict_size(network.plan, network.variables)
  largest = max(leaves[path].size for path in network.plan)
  return size.payload_bytes + 1.2 * 4 * largest


def _forms(network: Network) -> dict[str, inference.Applied]:
  """Returns {name: (function, its variables)}."""
  apply_fn, variables, *_ = network
  dense = vq_array.decode_params(variables)
  made = {"dense float32": inference.Applied(apply_fn, dense)}
  half = jax.tree.map(_halved, dense)

  def apply_half(variables: PyTree, inputs: jax.Array) -> jax.Array:
    return apply_fn(variables, inputs.astype(jnp.bfloat16))

  made["dense bfloat16"] = inference.Applied(apply_half, half)
  made["as loaded"] = inference.Applied(apply_fn, variables)
  for form in ("layer", "fused", "auto"):
    made[form] = inference.make_apply(apply_fn, variables, form)
  return made


def _halved(leaf: jax.Array) -> jax.Array:
  is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
  return leaf.astype(jnp.bfloat16) if is_float else leaf


def _bytes(variables: PyTree) -> int:
  return sum(leaf.nbytes for leaf in jax.tree.leaves(variables))


def _milliseconds(
  calls: dict[str, Callable[[], jax.Array]], repeats: int
) -> dict[str, tuple[float, float]]:
  """Returns {name: medians of (wall, processor) milliseconds}."""
  times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
  for _ in range(repeats):
    for name, call in calls.items():
      jax.block_until_ready(call())  # fetches its weights into the caches
      start = time.perf_counter(), time.process_time()
      for _ in range(_CALLS):
        jax.block_until_ready(call())
      end = time.perf_counter(), time.process_time()
      spent = tuple((b - a) / _CALLS for a, b in zip(start, end, strict=True))
      times[name].append(spent)
  return {
    name: tuple(1e3 * statistics.median(t) for t in zip(*rounds, strict=True))
    for name, rounds in times.items()
  }


def _mlp() -> Network:
  size, names = 4096, ("first", "second", "third")
  plan = plans.make_plan(
    [plans.Rule(".*", 256, 8)],
    {
      name: {"kernel": jax.ShapeDtypeStruct((size, size), jnp.float32)}
      for name in names
    },
  )
  shapes = {f"{name}/kernel": (size, size) for name in names}

  def apply_fn(variables: PyTree, x: jax.Array) -> jax.Array:
    for name in names:
      x = jax.nn.relu(x @ variables[name]["kernel"][...])
    return x

  return Network(apply_fn, trees.nest(_draw(plan, shapes)), (size,), plan)


def _vit() -> Network:
  network, sample = transformers.ViT(), (224, 224, 3)
  images = jnp.zeros((1, *sample))
  template = jax.eval_shape(network.init, jax.random.key(0), images)
  rules = [
    plans.Rule(".*/(patches/kernel|positions)", None),
    plans.Rule(".*", 256, 8),
  ]
  kernels = pqf_jax.find_kernels(network.apply, template, images)
  plan = plans.make_plan(rules, template, kernels)
  return Network(network.apply, _fill(plan, template), sample, plan)


def _from_recipe(name: str) -> Network:
  recipe = importlib.import_module(f"configs.{name}")
  config = recipe.get_config("imagenet2012")
  network, template = jobs.build_network(config)
  plan = planning.make_plan(config, network, template)
  return Network(network.apply, _fill(plan, template), (224, 224, 3), plan)


def _fill(plan: plans.CompressionPlan, template: PyTree) -> PyTree:
  """Returns variables of these shapes: random kernels, and ones."""
  shapes = {path: leaf.shape for path, leaf in trees.flatten(template).items()}
  dense = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), template)
  return trees.replace(dense, _draw(plan, shapes))


def _draw(
  plan: plans.CompressionPlan, shapes: dict[str, tuple[int, ...]]
) -> dict[str, vq_array.VQArray]:
  """Returns a random kernel for each layer of a plan."""
  rng = np.random.default_rng(0)
  kernels = {}
  for path, layer in plan.items():
    c_out, m, length = layer.spec.layout(shapes[path])
    codebook = rng.standard_normal((layer.num_codes, length), np.float32)
    dtype = vq_array.code_dtype(layer.num_codes)
    codes = rng.integers(0, layer.num_codes, (c_out, m), dtype)
    kernels[path] = vq_array.VQArray(
      jnp.array(codebook / np.sqrt(m * length, dtype=np.float32)),
      jnp.array(codes),
      shapes[path],
      layer.spec,
    )
  return kernels


if __name__ == "__main__":
  main()

"""Channel orders for a CIFAR-10 ResNet-18, beside those of the paper's code.

    python -m benchmarks.permutation --weights FILE.safetensors

FILE uses torchvision's names (conv1 3x3, 10 classes). Table 1 takes one kernel
at a time, as the authors do. It shows the log-determinant of the covariance of
the kernel's sub-vectors in the present order, after the authors' search as
rewritten here (the same rule, other random swaps), and after ours, with the
seconds of both, Gram matrix included. --published adds the results of the
authors' code on the same weights; it took 1,307 s for the 12 groups on 2 cores.

Table 2 runs the stage itself: every group, with all kernels that read it as the
objective; then the same order scored as the authors do, by the group's first
kernel alone, beside table 1's value for that kernel (and theirs); then the
relative squared error after --kmeans-steps steps of k-means. An order that
serves several kernels may be worse for the first one than an order for it
alone.
"""

import argparse
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from pqf_jax import permute
from pqf_jax.core import blocks, trees
from pqf_jax.core import plan as plans
from pqf_jax.discovery import discover
from pqf_jax.models import resnet, torch_names
from pqf_jax.permutation import covariance, objective
from pqf_jax.permutation import search as permutation_search

# Kernel: (channels a sub-vector, authors' sorted start, after 10,000 swaps).
PUBLISHED = {
  "layer1/0/conv2": (2, -149.582, -150.746),
  "layer2/0/conv2": (2, -157.240, -158.743),
  "layer3/0/conv2": (2, -164.441, -164.549),
  "layer3/1/conv2": (2, -184.307, -184.526),
  "layer4/0/conv2": (2, -204.059, -204.655),
  "layer4/1/conv2": (2, -242.001, -243.242),
  "layer1/0/conv1": (2, -154.797, -155.832),
  "layer2/1/conv1": (2, -158.535, -159.481),
  "layer3/1/conv1": (2, -167.565, -167.865),
  "layer4/1/conv1": (2, -222.338, -223.712),
  "layer4/0/downsample/0": (4, -35.755, -36.139),
  "fc": (4, -26.628, -27.175),
}
RULES = (
  plans.Rule("params/conv1/kernel", None),
  plans.Rule("params/fc/kernel", 2048, 4),
  plans.Rule("params/layer./0/downsample/0/kernel", 256, 4),
  plans.Rule("params/layer././conv[12]/kernel", 256, 2),
)


def main() -> None:
  """Prints both tables."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--weights", required=True)
  parser.add_argument("--published", action="store_true")
  parser.add_argument("--kmeans-steps", type=int, default=0)
  parser.add_argument("--seed", type=int, default=0)
  arguments = parser.parse_args()

  module = resnet.make(depth=18, num_classes=10, stem="small")
  images = jnp.zeros((1, 32, 32, 3))
  template = jax.eval_shape(module.init, jax.random.key(0), images)
  state = torch_names.read_safetensors(arguments.weights)
  variables = resnet.load_torch(state, template)
  alone = print_kernels(variables, arguments.published, arguments.seed)
  print_groups(module, variables, alone, arguments)


def print_kernels(
  variables: trees.PyTree, published: bool, seed: int
) -> dict[str, float]:
  """Prints table 1, one kernel at a time; returns {kernel: our value}."""
  names = ["kernel", "as is", "authors'", "s", "ours", "s"]
  names += ["published: sorted", "10,000 swaps"] if published else []
  print("|", " | ".join(names), "|\n|", " | ".join("-" * len(names)), "|")
  flat = trees.flatten(variables)
  ours, gains, seconds = {}, [], np.zeros(2)
  for name, (slots, *reference) in PUBLISHED.items():
    weights = _by_channel(flat[f"params/{name}/kernel"], slots)
    values, times = [], []
    for search in (
      permutation_search.search_like_authors,
      permutation_search.search_permutation,
    ):
      start = time.perf_counter()
      gram = covariance.channel_gram(
        weights, slots=slots, relative_ridge=permute.RELATIVE_RIDGE
      )
      values.append(search(np.random.default_rng(seed), [gram]).log_det)
      times.append(time.perf_counter() - start)
    before = objective.evaluate([gram], np.arange(weights.shape[1])).log_det
    theirs, ours[name] = values
    gains.append(ours[name] - (reference[1] if published else theirs))
    seconds += times
    row = [f"{before:.3f}", f"{theirs:.3f}", f"{times[0]:.2f}"]
    row += [f"{ours[name]:.3f}", f"{times[1]:.2f}"]
    row += [f"{value:.3f}" for value in reference] if published else []
    print("|", " | ".join([name, *row]), "|", flush=True)
  whose = "the published ones" if published else "the authors' search here"
  print(f"\nours - {whose}: mean {np.mean(gains):.3f}, most {max(gains):.3f};")
  print(f"seconds: {seconds[0]:.1f} authors' search, {seconds[1]:.1f} ours\n")
  return ours


def print_groups(
  module: resnet.ResNet,
  variables: trees.PyTree,
  alone: Mapping[str, float],
  arguments: argparse.Namespace,
) -> None:
  """Prints table 2; runs the stage twice, with compilation and without."""
  images = jnp.zeros((1, 32, 32, 3))
  axes = discover.infer_channels(module.apply, variables, images)
  plan = plans.make_plan(RULES, variables)
  seconds = []
  for _ in range(2):
    start = time.perf_counter()
    permuted, _, reports = permute.permute_channels(
      jax.random.key(arguments.seed),
      variables,
      axes,
      plan,
      kmeans_steps=arguments.kmeans_steps,
    )
    jax.block_until_ready(permuted)
    seconds.append(time.perf_counter() - start)
  names = ["group", "kernels", "all: before", "after", "first kernel"]
  names += ["before", "after", "alone (table 1)", "published"]
  names += ["error before", "after"]
  print("|", " | ".join(names), "|\n|", " | ".join("-" * len(names)), "|")
  missed = []
  for report in reports:
    path = report.consumers[0]
    first = path.removeprefix("params/").removesuffix("/kernel")
    values = [
      _log_det(trees.flatten(tree)[path], plan[path].spec.channels)
      for tree in (variables, permuted)
    ]
    row = [report.group, str(len(report.consumers))]
    row += [f"{report.log_det_before:.3f}", f"{report.log_det_after:.3f}"]
    row += [first, *(f"{value:.3f}" for value in values)]
    row.append(f"{alone[first]:.3f}" if first in alone else "")
    reference = arguments.published and PUBLISHED.get(first)
    row.append(f"{reference[2]:.3f}" if reference else "")
    row += [f"{report.error_before:.4f}", f"{report.error_after:.4f}"]
    print("|", " | ".join(row), "|", report.note)
    if reference and values[1] > reference[2]:
      missed.append(first)
  if arguments.published:
    print("\nfirst kernel above the published:", ", ".join(missed) or "none")
  print(
    f"\n{len(reports)} groups: {seconds[0]:.1f} s with compilation, "
    f"{seconds[1]:.1f} s without"
  )


def _by_channel(kernel: jax.Array, slots: int) -> np.ndarray:
  """Returns a kernel as [C_out, C_in, taps]."""
  return np.asarray(blocks.BlockSpec(slots).to_channels(kernel))


def _log_det(kernel: jax.Array, slots: int) -> float:
  """Returns the log-determinant of the sub-vectors in the present order."""
  gram = covariance.channel_gram(
    _by_channel(kernel, slots),
    slots=slots,
    relative_ridge=permute.RELATIVE_RIDGE,
  )
  return objective.evaluate([gram], np.arange(len(gram.sums))).log_det


if __name__ == "__main__":
  main()

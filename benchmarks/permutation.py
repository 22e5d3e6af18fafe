"""Channel orders for a CIFAR-10 ResNet-18, beside those of the paper's code.

    python benchmarks/permutation.py --weights FILE.safetensors

FILE holds torchvision's names (conv1 3x3, 10 classes). Table 1 looks at one
kernel at a time, as the authors do: log-determinant of the covariance of its
sub-vectors as it is, after the authors' search as rewritten here (the same
rule, other random swaps), and after ours; with the seconds of both, Gram matrix
included. --published adds what the authors' own code reached on the weights
that these figures were made with; it took 1,307 s for the 12 groups on 2 cores.

Table 2 is the stage itself: every group, all kernels that read it, and the
relative squared error after --kmeans-steps steps of k-means. On 2 cores both
take 20 s, and 15 s more with --kmeans-steps 10.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from pqf_jax import permute
from pqf_jax.core import blocks, discover, trees
from pqf_jax.core import plan as plans
from pqf_jax.models import resnet, torch_weights
from pqf_jax.ops import covariance, orders, permutation_search

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
  state = torch_weights.read_safetensors(arguments.weights)
  variables = resnet.load_torch(state, template)
  print_kernels(variables, arguments.published, arguments.seed)
  print_groups(module, variables, arguments.kmeans_steps, arguments.seed)


def print_kernels(variables: trees.PyTree, published: bool, seed: int) -> None:
  """Table 1: one kernel at a time."""
  names = ["kernel", "as is", "authors'", "s", "ours", "s"]
  names += ["published: sorted", "10,000 swaps"] if published else []
  print("|", " | ".join(names), "|\n|", " | ".join("-" * len(names)), "|")
  flat = trees.flatten(variables)
  gains, seconds = [], np.zeros(2)
  for name, (slots, *reference) in PUBLISHED.items():
    spec = blocks.BlockSpec(slots)
    weights = np.asarray(spec.to_channels(flat[f"params/{name}/kernel"]))
    found, times = [], []
    for search in (
      permutation_search.search_like_authors,
      permutation_search.search_permutation,
    ):
      start = time.perf_counter()
      gram = covariance.channel_gram(
        weights, slots=slots, relative_ridge=permute.RELATIVE_RIDGE
      )
      found.append(search(np.random.default_rng(seed), [gram]).log_det)
      times.append(time.perf_counter() - start)
    before = orders.evaluate([gram], np.arange(weights.shape[1])).log_det
    gains.append(found[1] - (reference[1] if published else found[0]))
    seconds += times
    row = [f"{before:.3f}", f"{found[0]:.3f}", f"{times[0]:.2f}"]
    row += [f"{found[1]:.3f}", f"{times[1]:.2f}"]
    row += [f"{value:.3f}" for value in reference] if published else []
    print("|", " | ".join([name, *row]), "|", flush=True)
  whose = "the published ones" if published else "the authors' search here"
  print(f"\nours - {whose}: mean {np.mean(gains):.3f}, most {max(gains):.3f};")
  print(f"seconds: {seconds[0]:.1f} authors' search, {seconds[1]:.1f} ours\n")


def print_groups(
  module: resnet.ResNet,
  variables: trees.PyTree,
  kmeans_steps: int,
  seed: int,
) -> None:
  """Table 2: the whole stage."""
  images = jnp.zeros((1, 32, 32, 3))
  axes = discover.infer_channels(module.apply, variables, images)
  start = time.perf_counter()
  permuted, _, reports = permute.permute_channels(
    jax.random.key(seed),
    variables,
    axes,
    plans.make_plan(RULES, variables),
    kmeans_steps=kmeans_steps,
  )
  jax.block_until_ready(permuted)
  seconds = time.perf_counter() - start
  print("| group | kernels | log-det before | after | error before | after |")
  print("| - | - | - | - | - | - |")
  for report in reports:
    row = [report.group, str(len(report.children))]
    row += [f"{report.log_det_before:.3f}", f"{report.log_det_after:.3f}"]
    row += [f"{report.error_before:.4f}", f"{report.error_after:.4f}"]
    print("|", " | ".join(row), "|", report.note)
  print(f"\n{seconds:.1f} s for {len(reports)} groups, compilation included")


if __name__ == "__main__":
  main()

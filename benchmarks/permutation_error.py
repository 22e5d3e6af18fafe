"""Error of k-means by channel order: does a better order lose less?

    python -m benchmarks.permutation_error --weights FILE.safetensors

FILE is a CIFAR-10 ResNet-18 with torchvision's names. All its layers are
quantized (large blocks, K = 256) in the present order, in that of the paper's
search and in ours. The table shows the squared error relative to the present
order, averaged over the layers that an order can change: mean and standard
deviation over --seeds seeds of the k-means.
"""

import argparse
import time

import jax
import numpy as np

from pqf_jax import permute, quantize
from pqf_jax.core import plan as plans
from pqf_jax.core import trees
from pqf_jax.discovery import discover
from pqf_jax.models import resnet, torch_names
from pqf_jax.permutation import search as permutation_search

SEARCHES = {
  "paper's: sorted, 10,000 swaps": permutation_search.search_like_authors,
  "ours": permutation_search.search_permutation,
}
RULES = (
  ("params/conv1/kernel", None, 1),
  (".*/(fc|downsample/0)/kernel", 256, 4),
  (".*/conv[12]/kernel", 256, 2),
)


def layer_errors(
  variables: object, plan: plans.CompressionPlan, seeds: int
) -> np.ndarray:
  """Returns [seeds, layers], the mean squared error over the variance."""
  runs = [
    quantize.quantize_params(jax.random.key(seed), variables, plan)[1]
    for seed in range(seeds)
  ]
  return np.array([[run[path].distortion for path in plan] for run in runs])


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--weights", required=True)
  parser.add_argument("--seeds", type=int, default=5)
  parser.add_argument("--steps", type=int, default=100)
  options = parser.parse_args()
  model = resnet.make(depth=18, num_classes=10, stem="small")
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
  template = jax.eval_shape(model.init, jax.random.key(0), images)
  state_dict = torch_names.read_safetensors(options.weights)
  variables = resnet.load_torch(state_dict, template)
  rules = [plans.Rule(*rule, options.steps) for rule in RULES]
  plan = plans.make_plan(rules, variables)
  axes = discover.infer_channels(model.apply, trees.shapes(variables), images)

  before = layer_errors(variables, plan, options.seeds)
  print(f"| order | error, {len(plan)} layers | seconds of the search |")
  print("|---|---|---|")
  for name, search in SEARCHES.items():
    start = time.perf_counter()
    permuted, _, _ = permute.permute_channels(
      jax.random.key(0), variables, axes, plan, search=search
    )
    seconds = time.perf_counter() - start
    errors = layer_errors(permuted, plan, options.seeds) / before.mean(0)
    by_seed = errors.mean(1)
    print(
      f"| {name} | {by_seed.mean():.4f} +- {by_seed.std():.4f} (worst layer "
      f"{errors.mean(0).max():.4f}) | {seconds:.1f} |"
    )


if __name__ == "__main__":
  main()

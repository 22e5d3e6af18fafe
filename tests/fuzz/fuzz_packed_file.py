"""Reads small packed files that were changed at random, of both formats.

    python -m tests.fuzz.fuzz_packed_file --count 1000000 --seed 0

A changed file must be refused by an `InputError`, or give the content of the
file that it was made from. With a right digest, as no accident makes it, it
must be refused, or be whole: written again it gives the same content. Nothing
may take more than a second, or more memory than twice what it declares.
"""

import argparse
import collections
import copy
import io
import itertools
import json
import re
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from pqf_jax import errors, pack
from pqf_jax.core import blocks, storage, vq_array
from pqf_jax.core import plan as plans
from pqf_jax.packing import container, header, structure

SLOW_SECONDS = 1.0
# Objects of Python whose number depends on the file's names alone.
SPARE_BYTES = 1 << 18
TRACED_EVERY = 64


class Failure(NamedTuple):
  """What a changed file should not have done."""

  kind: str
  what: str
  data: bytes


def seeds() -> list[bytes]:
  """Small files: compressed with norms, odd trees, dense, rounded, format 2."""
  rng = np.random.default_rng(0)

  def kernel(shape: tuple[int, ...], num_codes: int, spec: blocks.BlockSpec):
    c_out, m, length = spec.layout(shape)
    return vq_array.VQArray(
      rng.normal(size=(num_codes, length)).astype(np.float16).astype("f4"),
      rng.integers(0, num_codes, (c_out, m)).astype(np.uint8),
      shape,
      spec,
    )

  def norm() -> dict[str, Any]:
    vectors = rng.uniform(0.5, 1, (4, 3)).astype(np.float32)
    scale, bias, mean, var = vectors
    return {
      "params": {"bn": {"scale": scale, "bias": bias}},
      "batch_stats": {"bn": {"mean": mean, "var": var}},
    }

  network = norm()
  network["params"]["fc"] = {"kernel": kernel((4, 3), 3, blocks.BlockSpec(2))}
  odd = {
    "a/~b": [
      kernel((6, 4, 3), 4, blocks.BlockSpec(2, (1,), (0,))),
      (None, {}, ()),
    ],
    "": {7: np.arange(3, dtype=np.int16)},
    "stack": vq_array.VQArray(
      rng.normal(size=(3, 2, 3)).astype(np.float16).astype("f4"),
      rng.integers(0, 3, (4, 2, 2)).astype(np.uint8),
      (2, 3, 4),
      blocks.BlockSpec(3, (0, 1), (2,), (1,)),
    ),
  }
  made = [
    pack.pack_model(tree, norm_epsilon=1e-3, architecture={"name": "net"})
    for tree in (network, odd, norm())
  ]
  smallest = storage.Storage("int8", "float16")
  tiny = {"params": {"bias": np.full(3, 1e-6, np.float32)}, "step": np.ones(1)}
  made += [
    pack.pack_model(tree, norm_epsilon=1e-3, architecture={}, storage=smallest)
    for tree in (network, [odd, tiny], tiny)
  ]
  old = {
    "format": 2,
    "architecture": {"name": "net"},
    "norm_epsilon": 1e-3,
    "layers": {"params/fc/kernel": [[4, 3], 2, 3]},
  }
  buffers = {
    "codes": made[0].buffers[header.CODES],
    "codebooks": made[0].buffers[header.CODEBOOKS["float16"]],
    "bn.norm": made[0].buffers["bn~norm"],
    "params/fc/bias": np.ones(3, np.float32),
  }
  return [*map(pack.to_bytes, made), seal(old, buffers)]


def seal(fields: dict[str, Any], buffers: dict[str, np.ndarray]) -> bytes:
  """Returns a file with a right digest, whatever its header says."""
  try:
    fields = fields | {header.SHA256: header.digest(fields, buffers)}
    text = header.canonical(fields)
  except (KeyError, ValueError):  # no format, or text that is none
    text = json.dumps(fields)
  return container.write(buffers, {pack.METADATA_KEY: text})


def content(node: Any) -> Any:
  """Returns a tree as tuples that are equal where the trees are, to the bit."""
  if isinstance(node, vq_array.VQArray):
    parts = content(node.codebook), content(node.codes)
    return "vq", parts, node.kernel_shape, node.spec
  if isinstance(node, dict):
    children = ((repr(key), content(child)) for key, child in node.items())
    return "dict", tuple(sorted(children, key=lambda child: child[0]))
  if isinstance(node, list | tuple):
    return type(node).__name__, tuple(map(content, node))
  if node is None:
    return None
  return node.dtype.name, node.shape, node.tobytes()


# ---- changes that leave the digest as it is ---------------------------------


def flip_bits(rng: np.random.Generator, data: bytes) -> bytes:
  """Flips one bit, or a few."""
  changed = bytearray(data)
  for _ in range(rng.integers(1, 5)):
    changed[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
  return bytes(changed)


def cut(rng: np.random.Generator, data: bytes) -> bytes:
  """Truncates the file, or appends to it."""
  if rng.random() < 0.2:
    return data + rng.bytes(rng.integers(1, 20))
  return data[: rng.integers(len(data))]


def splice(rng: np.random.Generator, data: bytes) -> bytes:
  """Puts a piece of the file in the place of another."""
  a, b, c, d = rng.integers(0, len(data), 4)
  return data[:a] + data[min(b, c) : max(b, c)] + data[d:]


def overwrite(rng: np.random.Generator, data: bytes) -> bytes:
  """Writes bytes that mean something, somewhere."""
  pieces = (b"0", b"9", b'"', b"{", b"}", b"[", b"-", b"e9", b"\\u0000", b"\0")
  piece = pieces[rng.integers(len(pieces))]
  start = rng.integers(len(data))
  return data[:start] + piece + data[start + len(piece) :]


def noise(rng: np.random.Generator, data: bytes) -> bytes:
  """Makes up all but the length of the header."""
  kept = int(rng.choice([0, 8, 9]))
  return data[:kept] + rng.bytes(rng.integers(0, 300))


# ---- changes with a right digest --------------------------------------------

VALUES = (
  *(None, True, False, -1, 0, 1, 2, 3, 4, 7, 255, 65536, 1 << 40, 1 << 70),
  *(0.5, -1.5, 1e308, "", "x", "2", "float16", "int8", "list", "none"),
  *([], {}, [1], [2, 2], [3, 4], [1 << 40] * 4, [[[[]]]], {"a": 1}, {"": []}),
)


def edit_header(rng: np.random.Generator, data: bytes) -> bytes:
  """Changes, removes, renames or adds fields."""
  fields, buffers = _open(data)
  for _ in range(rng.integers(1, 3)):
    places = list(_places(fields))
    parent, key = places[rng.integers(len(places))]
    value = copy.deepcopy(VALUES[rng.integers(len(VALUES))])
    action = rng.integers(5)
    if action == 0:
      del parent[key]
    elif action == 1 and isinstance(parent, dict):
      parent[f"{key}{'/~12x'[rng.integers(5)]}"] = parent.pop(key)
    elif action == 2 and isinstance(parent[key], int):
      parent[key] += int(rng.integers(-3, 4))
    elif action == 3 and isinstance(parent[key], dict):
      parent[key][str(value)[:9]] = value
    else:
      parent[key] = value
    if not fields:
      break
  return seal(fields, buffers)


def edit_buffers(rng: np.random.Generator, data: bytes) -> bytes:
  """Changes, removes, renames or adds buffers."""
  fields, buffers = _open(data)
  names = list(buffers)
  name = names[rng.integers(len(names))]
  array = buffers[name]
  kinds = list(container.TYPES.values())
  kind = kinds[rng.integers(len(kinds))]
  flat = np.frombuffer(array.tobytes(), np.uint8)
  changed = (
    lambda: np.frombuffer(rng.bytes(array.nbytes), array.dtype),
    lambda: array.reshape(-1)[: rng.integers(array.size + 1)],
    lambda: np.append(array, array.reshape(-1)[:1]),
    lambda: array[None],
    lambda: flat[: flat.size // kind.itemsize * kind.itemsize].view(kind),
    lambda: array.astype(kind),
  )[rng.integers(6)]()
  action = rng.integers(4)
  if action == 0:
    buffers[f"{name}{'/~12x'[rng.integers(5)]}"] = buffers.pop(name)
  elif action == 1:
    del buffers[name]
  else:
    same = changed.size == array.size
    buffers[name] = changed.reshape(array.shape) if same else changed
  if rng.random() < 0.1:
    return seal(*_open(edit_header(rng, seal(fields, buffers))))
  return seal(fields, buffers)


def _open(data: bytes) -> tuple[Any, dict[str, np.ndarray]]:
  metadata, buffers = container.read(io.BytesIO(data), len(data))
  return json.loads(metadata[pack.METADATA_KEY]), dict(buffers)


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
  """Yields (parent, key) of everything within a JSON value."""
  items = list(node.items()) if isinstance(node, dict) else enumerate(node)
  for key, child in items:
    yield node, key
    if isinstance(child, dict | list):
      yield from _places(child)


Change = Callable[[np.random.Generator, bytes], bytes]
ACCIDENTS: tuple[Change, ...] = (flip_bits, cut, splice, overwrite, noise)
FORGERIES: tuple[Change, ...] = (edit_header, edit_buffers)


# ---- trials -----------------------------------------------------------------


def read(data: bytes) -> tuple[pack.PackedModel, Any] | None:
  """Returns the content of a file, or None where it is refused."""
  try:
    packed, _ = pack.from_bytes(data)
    return packed, pack.unpack_model(packed)
  except errors.InputError:
    return None


def survives(packed: pack.PackedModel, tree: Any) -> bool:
  """Returns whether a tree that was read comes back when it is written."""
  folded = header.check(*packed).norms
  leaves, _ = structure.take_apart(tree, vq_array.is_vq)
  compressed = any(map(vq_array.is_vq, leaves.values()))
  if compressed and plans.foldable_norms(leaves).keys() - folded.keys():
    return True  # it holds a norm as it is, which would be folded now
  again = pack.pack_model(
    tree,
    norm_epsilon={re.escape(norm): folded[norm][0] for norm in folded},
    architecture=packed.header["architecture"],
  )
  found = read(pack.to_bytes(again))
  return found is not None and content(found[1]) == content(tree)


def trial(data: bytes, expected: Any) -> str:
  """Returns what became of a file: 'refused', 'same', 'whole' or a fault.

  Args:
    data: the changed file.
    expected: `content` of the file that it was; None: the digest is right.
  """
  found = read(data)
  if found is None:
    return "refused"
  packed, tree = found
  if expected is not None and content(tree) == expected:
    return "same"
  if expected is None:
    return "whole" if survives(packed, tree) else "FAULT: comes back otherwise"
  # Format 2 has no digest of its header.
  return "unprotected" if packed.header["format"] == 2 else "FAULT: accepted"


def measured(data: bytes, expected: Any) -> str:
  """Returns what became of a file, whose memory is traced."""
  tracemalloc.start()
  try:
    found = read(data)
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  leaves = jax.tree.leaves(found[1]) if found else []
  declared = len(data) + sum(leaf.nbytes for leaf in leaves)
  if peak > 2 * declared + SPARE_BYTES:
    return f"FAULT: {peak:,} bytes for {declared:,}"
  return trial(data, expected)


def run(count: int, seed: int) -> tuple[collections.Counter, list[Failure]]:
  """Changes files at random, and reads them.

  Returns:
    ({(change, what became of the file): times}, failures).
  """
  rng = np.random.default_rng(seed)
  files = [(data, content(read(data)[1])) for data in seeds()]
  changes = [*ACCIDENTS, *FORGERIES, *FORGERIES]
  outcomes: collections.Counter = collections.Counter()
  failures = []
  for i in range(count):
    data, expected = files[rng.integers(len(files))]
    change = changes[rng.integers(len(changes))]
    changed = change(rng, data)
    oracle = None if change in FORGERIES else expected
    judge = measured if i % TRACED_EVERY == 0 else trial
    start = time.perf_counter()
    try:
      outcome = judge(changed, oracle)
    except Exception as error:  # whatever is raised is what is looked for
      outcome = f"FAULT: {type(error).__name__}: {error}"
    if time.perf_counter() - start > SLOW_SECONDS:
      outcome = "FAULT: slow"
    outcomes[change.__name__, outcome.partition(":")[0]] += 1
    if outcome.startswith("FAULT"):
      failures.append(Failure(change.__name__, outcome, changed))
  return outcomes, failures


def flips(data: bytes) -> Iterator[tuple[int, str]]:
  """Yields (byte, what became of the file) for every single bit."""
  expected = content(read(data)[1])
  for place, bit in itertools.product(range(len(data)), range(8)):
    changed = bytearray(data)
    changed[place] ^= 1 << bit
    yield place, trial(bytes(changed), expected)


def main() -> int:
  """Prints the table of outcomes, and saves files that did wrong."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--count", type=int, default=100_000)
  parser.add_argument("--seed", type=int, default=0)
  arguments = parser.parse_args()
  start, cpu = time.perf_counter(), time.process_time()
  outcomes, failures = run(arguments.count, arguments.seed)
  for (change, outcome), times in sorted(outcomes.items()):
    sys.stdout.write(f"{change:15}{outcome:15}{times:10,}\n")
  for i, failure in enumerate(failures[:20]):
    name = f"packed_file_{arguments.seed}_{i}.bin"
    with open(name, "wb") as file:
      file.write(failure.data)
    sys.stdout.write(f"{name}: {failure.kind}: {failure.what}\n")
  sys.stdout.write(
    f"{arguments.count:,} files, {len(failures)} failures, "
    f"{time.perf_counter() - start:.0f} s, CPU {time.process_time() - cpu:.0f}"
    " s\n"
  )
  return 1 if failures else 0


if __name__ == "__main__":
  sys.exit(main())

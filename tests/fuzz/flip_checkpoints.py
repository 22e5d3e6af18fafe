"""Flips bits in the checkpoints of a finished job.

    python -m tests.fuzz.flip_checkpoints --flips 400 --seed 0

A stage with a flipped bit is refused, or restored as it was saved.
"""

import argparse
import collections
import pathlib
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from pqf_jax import errors, models
from pqf_jax.core import plan as plans
from pqf_jax.core import trees
from pqf_jax.pipeline import job as jobs
from pqf_jax.pipeline import planning, training
from pqf_jax.runtime import checkpoint
from tests.fuzz import kill_jobs
from tests.pipeline import tiny

PyTree = Any
Stored = tuple[PyTree, checkpoint.Record]


def flips(
  workdir: pathlib.Path, targets: Mapping[str, PyTree], *, count: int, seed: int
) -> Iterator[tuple[pathlib.Path, bool]]:
  """Flips one bit at a time, and restores the stage whose file it is in.

  Args:
    workdir: with checkpoints; each bit is flipped back.
    targets: {stage: its tree, as shapes}.
    count: flips; every file is as likely as any other.
    seed: of their places.

  Yields:
    The file, and whether its stage was refused.

  Raises:
    AssertionError: it was restored as something else.
  """
  checkpoints = checkpoint.Checkpoints(workdir)
  saved = {name: checkpoints.restore(name, targets[name]) for name in targets}
  root = workdir / "checkpoints"
  files = sorted(
    path for path in root.rglob("*") if path.is_file() and path.stat().st_size
  )
  draws = random.Random(seed)
  for _ in range(count):
    path = draws.choice(files)
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[draws.randrange(len(damaged))] ^= 1 << draws.randrange(8)
    path.write_bytes(damaged)
    stage = path.relative_to(root).parts[0].removesuffix(".json")
    try:
      found = checkpoints.restore(stage, targets[stage])
    except errors.InputError as error:
      assert "\n" not in str(error)
      yield path, True
    else:
      assert _are_equal(found, saved[stage]), f"{path} is restored as another"
      yield path, False
    finally:
      path.write_bytes(content)


def _are_equal(found: Stored | None, saved: Stored | None) -> bool:
  if found is None or saved is None or found[1] != saved[1]:
    return False
  pairs = zip(jax.tree.leaves(found[0]), jax.tree.leaves(saved[0]), strict=True)
  return all(
    np.asarray(one).tobytes() == np.asarray(other).tobytes()
    for one, other in pairs
  )


def tiny_targets() -> dict[str, PyTree]:
  """Returns the trees that the stages of the tiny job save."""
  models.register("tiny", "tests.pipeline.tiny")
  config = tiny.get_config()
  network, template = jobs.build_network(config)
  plan = planning.make_plan(config, network, template)
  compressed = trees.shapes(plans.compressed_shapes(plan, template))
  return {
    "dense": template,
    "permute": template,
    "quantize": compressed,
    "finetune": training.Fitted(compressed, compressed),
  }


def main() -> None:
  """Flips bits as the command line says, and counts them by file."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--flips", type=int, default=400)
  parser.add_argument("--seed", type=int, default=0)
  options = parser.parse_args()
  refused: collections.Counter[bool] = collections.Counter()
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    kill_jobs.Jobs(folder, None).seconds(folder / "run")
    for _, is_refused in flips(
      folder / "run", tiny_targets(), count=options.flips, seed=options.seed
    ):
      refused[is_refused] += 1
  sys.stdout.write(
    f"flips={sum(refused.values())}: {refused[True]} refused, "
    f"{refused[False]} restored as saved\n"
  )


if __name__ == "__main__":
  main()

"""Mask R-CNN on cell nuclei: dense, and compressed with or without permutation.

    python -m benchmarks.nuclei --data DIR --backbone FILE --devices 0 1

1. Trains the dense network once for every learning rate of --rates, side by
   side; the one with the best mask AP is compressed.
2. Permutes it (or not), quantizes and fine-tunes it. The --seeds of the
   fine-tuning share channel order and codes, which the first seed computes.

DIR is a folder in COCO's layout with one category, FILE a ResNet-50 classifier.
Jobs are processes; those of one order share one of the GPUs of --devices. A
study that was stopped continues where it stopped. Each result is printed and
added to `docs/nuclei.json`; the tables of `docs/nuclei.md` are written last.
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import pathlib
import shutil
import statistics
import time
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks import study

ORDERS = {"assignment": "permuted", "none": "as trained"}
# Stages that the seeds of one order share.
SHARED = ("dense", "permute", "quantize")
STAGES = ("dense", "quantized", "finetuned", "packed")
KINDS = ("box", "mask")
Job = concurrent.futures.Future[study.Record]


def main() -> None:
  """Runs the missing jobs and writes the page."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--data", required=True)
  parser.add_argument("--backbone", required=True)
  parser.add_argument("--devices", nargs="+", default=["0"])
  parser.add_argument("--rates", nargs="+", type=float, default=[1e-4, 2e-4])
  parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
  parser.add_argument("--orders", nargs="+", default=list(ORDERS))
  parser.add_argument("--workdir", type=pathlib.Path, default="runs/nuclei")
  parser.add_argument("--docs", type=pathlib.Path, default=study.ROOT / "docs")
  parser.add_argument("--recipe", default="configs/mask_rcnn.py:nuclei")
  options = parser.parse_args()
  flags = [
    f"--config={options.recipe}",
    f"--config.data.dir={options.data}",
    f"--config.backbone={options.backbone}",
    "--config.calibrate.images=0",  # what it gains: docs/nuclei.md
  ]
  devices = study.Devices(options.devices, options.workdir)
  records = study.Records(options.docs / "nuclei.json")

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    trained = [
      pool.submit(train, rate, position, options, flags, devices)
      for position, rate in enumerate(options.rates)
    ]
    collect(trained, records)
    dense = max(
      (record for record in records.rows if record["kind"] == "dense"),
      key=lambda record: record["mask_ap"],
    )
    compressed = []
    for position, order in enumerate(options.orders):
      common = order, position, dense["run"], options, flags, devices
      first = pool.submit(compress, options.seeds[0], *common)
      others = [
        pool.submit(compress, seed, *common, first)
        for seed in options.seeds[1:]
      ]
      compressed += [first, *others]
    collect(compressed, records)
  write_page(records, options.docs)


def collect(jobs: Iterable[Job], records: study.Records) -> None:
  """Adds results as they come; jobs of earlier runs return theirs again."""
  for done in concurrent.futures.as_completed(jobs):
    if (record := done.result())["run"] not in records:
      records.add(record)


def train(
  rate: float,
  position: int,
  options: argparse.Namespace,
  flags: Sequence[str],
  devices: study.Devices,
) -> study.Record:
  """Trains the dense network."""
  name = f"dense-{rate:g}"
  on_one = -(-len(options.rates) // len(options.devices))
  results = study.run_main(
    [
      *flags,
      "--config.mode=train",
      f"--config.train.learning_rate={rate}",
    ],
    options.workdir / name,
    devices.environment(position, on_one),
  )
  return {"run": name, "kind": "dense", "learning_rate": rate, **results}


def compress(
  seed: int,
  order: str,
  position: int,
  dense: str,
  options: argparse.Namespace,
  flags: Sequence[str],
  devices: study.Devices,
  first: Job | None = None,
) -> study.Record:
  """Fine-tunes the network that the job of the first seed quantizes."""
  name = f"{order}-{seed}"
  workdir = options.workdir / name
  if first is None:
    copy_stages(options.workdir / dense, workdir, ("dense",))
  else:
    source = options.workdir / f"{order}-{options.seeds[0]}"
    while not (source / f"checkpoints/{SHARED[-1]}.json").exists():
      if first.done():
        first.result()  # raises the error of a failed job
      time.sleep(1)
    copy_stages(source, workdir, SHARED)
    if not (workdir / "config.json").exists():
      # From now on the stages belong to this seed.
      config = json.loads((source / "config.json").read_text())
      text = json.dumps(config | {"seed": seed})
      (workdir / "config.json").write_text(text)
  on_one = len(options.seeds) * -(-len(options.orders) // len(options.devices))
  results = study.run_main(
    [
      *flags,
      f"--config.permute.search={order}",
      f"--config.seed={seed}",
    ],
    workdir,
    devices.environment(position, on_one),
  )
  return {
    "run": name,
    "kind": "compressed",
    "order": order,
    "seed": seed,
    "device": results["device"],
    "date": results["date"],
    "seconds": results["seconds"],
    "dense_bytes": results["dense_bytes"],
    "payload_bytes": results["payload_bytes"],
    "file_bytes": results["file_bytes"],
    "ratio": results["ratio"],
    "error": study.quantization_error(workdir),
    **{
      f"{kind}_ap_{stage}": results[f"{kind}_ap_{stage}"]
      for kind, stage in itertools.product(KINDS, STAGES)
    },
  }


def copy_stages(
  source: pathlib.Path, target: pathlib.Path, stages: Iterable[str]
) -> None:
  """Copies checkpoints to another workdir, which then begins after them."""
  source, target = source / "checkpoints", target / "checkpoints"
  for stage in stages:
    if (target / f"{stage}.json").exists():
      continue
    shutil.copytree(source / stage, target / stage, dirs_exist_ok=True)
    # The record comes last: it marks the stage as done.
    shutil.copy(source / f"{stage}.json", target)


def write_page(records: study.Records, docs: pathlib.Path) -> None:
  """Writes docs/nuclei.md."""
  study.write_page(
    docs / "nuclei.md", "benchmarks/nuclei.py", page(records.rows)
  )


def page(rows: Sequence[dict[str, Any]]) -> Iterable[str]:
  """Yields the lines of its tables."""
  dense = [row for row in rows if row["kind"] == "dense"]
  compressed = [row for row in rows if row["kind"] == "compressed"]
  yield from ("## Dense", "", "| learning rate | box AP | mask AP |")
  yield "|---|---|---|"
  for row in dense:
    yield (
      f"| {row['learning_rate']:g} | {100 * row['box_ap']:.2f} | "
      f"{100 * row['mask_ap']:.2f} |"
    )
  if not compressed:
    return
  size = compressed[0]
  best = max(row["mask_ap"] for row in dense)
  yield from (
    "",
    "## Compressed",
    "",
    f"{size['dense_bytes']:,} B to {size['payload_bytes']:,} B payload, "
    f"{size['file_bytes']:,} B file, {size['ratio']:.1f}x; seeds "
    f"{sorted({row['seed'] for row in compressed})}, {size['device']}, "
    f"{max(row['date'] for row in compressed)[:10]}. Means (and ranges) over "
    "the seeds.",
    "",
    "| order | squared error | box AP quantized | mask AP quantized | box AP "
    "fine-tuned | mask AP fine-tuned | of dense mask AP |",
    "|---|---|---|---|---|---|---|",
  )
  for order, title in ORDERS.items():
    if not (runs := [row for row in compressed if row["order"] == order]):
      continue
    cells = [study.mean_and_range([row["error"] for row in runs], 4)]
    for stage, kind in itertools.product(("quantized", "packed"), KINDS):
      values = [100 * row[f"{kind}_ap_{stage}"] for row in runs]
      cells.append(study.mean_and_range(values, 2))
    share = statistics.mean(row["mask_ap_packed"] for row in runs) / best
    yield f"| {title} | {' | '.join(cells)} | {100 * share:.1f} % |"
  yield ""


if __name__ == "__main__":
  main()

r"""Tests the paper's claims one by one: permutation, k-means, fine-tuning.

    python -m benchmarks.ablation --data DIR --weights NAME=FILE ... \
        --devices 0 1 --jobs 6

Runs the whole job for every study, channel order, k-means and seed that
`docs/ablation.json` does not hold yet, adds the results there, and writes
`docs/ablation.md` and `docs/ablation.svg` (with matplotlib) from all of them.
DIR is the parent folder of the data sets; NAME is resnet18_cifar10 or
mobilenet_v2. --studies selects some, --jobs is the number of jobs that run at
the same time on each of the GPUs of --devices.
"""

import argparse
import concurrent.futures
import itertools
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from benchmarks import study as studies

DOCS = studies.ROOT / "docs"
Record = studies.Record


class Study(NamedTuple):
  """One network, data set and block size.

  Attributes:
    title: of its table.
    weights: the name in --weights of the file that it starts from.
    flags: of main.py.
  """

  title: str
  weights: str
  flags: tuple[str, ...]


# Labels of 3,500 images of 10 classes would teach the network that the other
# 990 classes do not exist, so the dense network is the teacher.
MOBILENET = ("--config.distillation.share=1.0", "--config.finetune.epochs=6")
STUDIES = {
  "resnet18_large": Study(
    "ResNet-18, CIFAR-10, large blocks",
    "resnet18_cifar10",
    ("--config=configs/resnet18.py:cifar10,large",),
  ),
  "resnet18_small": Study(
    "ResNet-18, CIFAR-10, small blocks",
    "resnet18_cifar10",
    ("--config=configs/resnet18.py:cifar10",),
  ),
  "mobilenet_v2_small": Study(
    "MobileNetV2, 10 classes of ImageNet, blocks of 4",
    "mobilenet_v2",
    ("--config=configs/mobilenet_v2.py:imagenet2012", *MOBILENET),
  ),
  "mobilenet_v2_large": Study(
    "MobileNetV2, 10 classes of ImageNet, blocks of 8",
    "mobilenet_v2",
    ("--config=configs/mobilenet_v2.py:imagenet2012,large", *MOBILENET),
  ),
  # The control: what the same fine-tuning does to the dense network.
  "mobilenet_v2_dense": Study(
    "MobileNetV2, 10 classes of ImageNet, nothing compressed",
    "mobilenet_v2",
    (
      "--config=configs/mobilenet_v2.py:imagenet2012",
      '--config.rules=((".*",None,1,1),)',
      *MOBILENET,
    ),
  ),
  **{
    f"mobilenet_v2_{size}_{rule}": Study(
      f"MobileNetV2, blocks of {block}, depthwise kernels {what}",
      "mobilenet_v2",
      (
        f"--config=configs/mobilenet_v2.py:imagenet2012,{rule}"
        + ",large" * (size == "large"),
        *MOBILENET,
      ),
    )
    for size, block in (("small", 4), ("large", 8))
    for rule, what in (
      ("dense_depthwise", "dense"),
      ("uniform", "as all others"),
    )
  },
}
ORDERS = {"none": "as trained", "assignment": "permuted"}
KMEANS = {False: "Lloyd", True: "annealed"}
FIELDS = ("top1_dense", "top1_quantized", "top1_finetuned", "payload_bytes")
# Title, factor and digits.
COLUMNS = {
  "error": ("squared error", 1, 4),
  "top1_quantized": ("top-1 quantized", 100, 2),
  "top1_finetuned": ("top-1 fine-tuned", 100, 2),
}


def main() -> None:
  """Runs the missing jobs and writes the page."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--data", help="parent folder of the data sets")
  parser.add_argument("--weights", nargs="*", default=[], metavar="NAME=FILE")
  parser.add_argument("--studies", nargs="*", default=list(STUDIES))
  parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
  parser.add_argument("--orders", nargs="*", default=list(ORDERS))
  parser.add_argument("--kmeans", nargs="*", default=list(KMEANS.values()))
  parser.add_argument("--jobs", type=int, default=1)
  parser.add_argument("--devices", nargs="+", default=["0"])
  parser.add_argument("--workdir", type=pathlib.Path, default="runs/ablation")
  parser.add_argument("--docs", type=pathlib.Path, default=DOCS)
  options = parser.parse_args()
  records = studies.Records(options.docs / "ablation.json")
  weights = dict(pair.split("=", 1) for pair in options.weights)
  devices = studies.Devices(options.devices, options.workdir)
  missing = [
    (name, study, order, annealed, seed)
    for seed, study, order, annealed in itertools.product(
      options.seeds, options.studies, options.orders, KMEANS
    )
    if KMEANS[annealed] in options.kmeans
    if (name := f"{study}-{order}-{annealed}-{seed}") not in records
  ]
  num_workers = options.jobs * len(options.devices)
  with concurrent.futures.ThreadPoolExecutor(num_workers) as pool:
    waiting = [
      pool.submit(
        run_one,
        *run,
        options,
        weights,
        devices.environment(position, options.jobs),
      )
      for position, run in enumerate(missing)
    ]
    for done in concurrent.futures.as_completed(waiting):
      records.add(done.result())
  studies.write_page(
    options.docs / "ablation.md", "benchmarks/ablation.py", page(records.rows)
  )
  draw(records.rows, options.docs / "ablation.svg")


def run_one(
  name: str,
  study: str,
  order: str,
  annealed: bool,
  seed: int,
  options: argparse.Namespace,
  weights: dict[str, str],
  environment: dict[str, str],
) -> Record:
  """Runs one whole job in a process of its own, from where it stopped."""
  workdir = options.workdir / name
  flags = [
    *STUDIES[study].flags,
    f"--config.data.dir={options.data}",
    f"--config.weights={weights[STUDIES[study].weights]}",
    f"--config.permute.search={order}",
    f"--config.quantize.annealed={annealed}",
    "--config.calibrate.images=0",
    f"--config.seed={seed}",
  ]
  results = studies.run_main(flags, workdir, environment)
  return {
    "run": name,
    "study": study,
    "order": order,
    "annealed": annealed,
    "seed": seed,
    "device": results["device"],
    "date": results["date"],
    "error": studies.quantization_error(workdir),
    **{field: results[field] for field in FIELDS},
  }


def page(records: Sequence[Record]) -> Iterable[str]:
  """Yields the lines of the tables of docs/ablation.md."""
  for study, rows in _by_study(records).items():
    dense = 100 * rows[0]["top1_dense"]
    seeds = sorted({row["seed"] for row in rows})
    devices = ", ".join(sorted({row["device"] for row in rows}))
    yield from (
      f"## {STUDIES[study].title}",
      "",
      f"`{' '.join(STUDIES[study].flags)}`; dense {dense:.2f} % top-1, payload "
      f"{rows[0]['payload_bytes']:,} B, seeds {seeds}, {devices}, "
      f"{max(row['date'] for row in rows)[:10]}.",
      "",
      "| order | k-means | "
      + " | ".join(title for title, *_ in COLUMNS.values())
      + " |",
      "|---|---|" + "---|" * len(COLUMNS),
    )
    for order, annealed in itertools.product(ORDERS, KMEANS):
      if not (runs := _select(rows, order, annealed)):
        continue
      cells = [
        studies.mean_and_range([scale * run[field] for run in runs], digits)
        for field, (_, scale, digits) in COLUMNS.items()
      ]
      yield f"| {ORDERS[order]} | {KMEANS[annealed]} | {' | '.join(cells)} |"
    yield ""


def draw(records: Sequence[Record], path: pathlib.Path) -> None:
  """Plots top-1 after quantization and after fine-tuning, a panel a study."""
  from matplotlib import pyplot  # not installed on every machine

  both = set(KMEANS)
  plotted = {
    study: rows
    for study, rows in _by_study(records).items()
    if {row["annealed"] for row in rows} == both
  }
  figure, axes = pyplot.subplots(
    2, len(plotted), figsize=(3.2 * len(plotted), 5), squeeze=False
  )
  bars = list(itertools.product(ORDERS, KMEANS))
  labels = [f"{ORDERS[o]}\n{KMEANS[a]}" for o, a in bars]
  for column, (study, rows) in enumerate(plotted.items()):
    for line, field in enumerate(("top1_quantized", "top1_finetuned")):
      panel = axes[line][column]
      for x, (order, annealed) in enumerate(bars):
        values = [100 * row[field] for row in _select(rows, order, annealed)]
        if not values:
          continue
        panel.plot([x] * len(values), values, "o", alpha=0.6, color="C0")
        panel.plot(x, statistics.mean(values), "_", ms=24, color="C1")
      panel.set_xticks(range(len(bars)), labels, fontsize=7)
      panel.set_xlim(-0.5, len(bars) - 0.5)
      panel.set_title(
        f"{STUDIES[study].title}\n{COLUMNS[field][0]}, %", fontsize=7
      )
      panel.grid(axis="y", alpha=0.3)
  figure.tight_layout()
  # No date inside, so that the same figures give the same file.
  figure.savefig(path, metadata={"Date": None})


def _by_study(records: Sequence[Record]) -> dict[str, list[Record]]:
  """Returns {study: its records} of the studies that have any."""
  by_study = {
    study: [record for record in records if record["study"] == study]
    for study in STUDIES
  }
  return {study: rows for study, rows in by_study.items() if rows}


def _select(
  records: Sequence[Record], order: str, annealed: bool
) -> list[Record]:
  return [
    record
    for record in records
    if record["order"] == order and record["annealed"] == annealed
  ]


if __name__ == "__main__":
  main()

"""Checks what README's main job promises: check_results.py WORKDIR."""

import json
import os
import pathlib
import sys

workdir = pathlib.Path(sys.argv[1])
results = json.loads((workdir / "results.json").read_text())
size = os.path.getsize(workdir / "model.safetensors")
lost = results["top1_dense"] - results["top1_packed"]
seconds = sum(results["seconds"].values())
checks = {
  f"dense top-1 {results['top1_dense']:.4f} >= 0.98": (
    results["top1_dense"] >= 0.98
  ),
  f"packed top-1 {results['top1_packed']:.4f} within 0.006 of it": (
    lost <= 0.006
  ),
  f"{results['dense_bytes']} / {size} B on disk >= 28": (
    results["dense_bytes"] / size >= 28
  ),
  f"header: {size} <= 1.015 * {results['payload_bytes']} B": (
    size <= 1.015 * results["payload_bytes"]
  ),
}
for what, holds in checks.items():
  sys.stdout.write(f"{'ok    ' if holds else 'MISSED'} {what}\n")
sys.stdout.write(f"      {seconds:.0f} s in the stages\n")
sys.exit(not all(checks.values()))

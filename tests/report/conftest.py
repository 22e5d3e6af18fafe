"""A run to report on: real shapes, made-up figures."""

import math

import numpy as np
import pytest

from pqf_jax.core import plan
from pqf_jax.report import schema


def resnet18_shapes():
  """Returns {path: shape} of ResNet-18: 20 compressed kernels and the rest."""
  shapes = {"params/conv1/kernel": (7, 7, 3, 64)}
  for stage, width in enumerate((64, 128, 256, 512), 1):
    for block in (0, 1):
      into = width // 2 if stage > 1 and block == 0 else width
      name = f"params/layer{stage}/{block}"
      shapes[f"{name}/conv1/kernel"] = (3, 3, into, width)
      shapes[f"{name}/conv2/kernel"] = (3, 3, width, width)
      if into != width:
        shapes[f"{name}/downsample/0/kernel"] = (1, 1, into, width)
  shapes["params/fc/kernel"] = (512, 1000)
  norms = {
    path.replace("conv", "bn").replace("kernel", leaf): shape[-1:]
    for path, shape in shapes.items()
    if "fc" not in path
    for leaf in ("scale", "bias")
  }
  return shapes | norms | {"params/fc/bias": (1000,)}


def layer_size(path, shape):
  num_weights = math.prod(shape)
  if len(shape) == 1 or path == "params/conv1/kernel":
    return plan.LayerSize(path, shape, 0, 0, 0, 4 * num_weights)
  length = 9 if shape[:2] == (3, 3) else 4
  num_subvectors = num_weights // length
  num_codes = 2048 if "fc" in path else min(256, num_subvectors // 4)
  bits = math.ceil(math.log2(num_codes))
  num_bytes = num_subvectors * bits // 8 + 2 * num_codes * length
  return plan.LayerSize(
    path, shape, length, num_codes, num_subvectors, num_bytes
  )


@pytest.fixture
def run():
  """Returns the data of a run of ResNet-18, with plausible figures."""
  rng = np.random.default_rng(0)
  layers = [layer_size(*item) for item in resnet18_shapes().items()]
  quantized = [layer for layer in layers if layer.num_codes]
  groups = [
    {
      "group": f"group{number}",
      "consumers": [layer.path for layer in quantized[number : number + 2]],
      "size": layer.shape[-1],
      "log_det_before": -60.5 - 3.25 * number,
      "log_det_after": -61 - 3.5 * number,
      "error_before": 0.2 + 0.01 * number if number < 10 else 0.0,
      "error_after": 0.2 - 0.01 * number if number < 10 else 0.0,
      "accepted": number != 7,
      "note": "" if number != 7 else "accuracy fell",
    }
    for number, layer in enumerate(quantized[:12])
  ]
  history = [
    {
      "stage": stage,
      "step": step,
      "epoch": step / 390,
      "loss": start * math.exp(-step / 900) + 0.1 * float(rng.uniform()),
      "images_per_second": 812.0,
    }
    | dict.fromkeys(
      ["top1"] if step % 390 == 0 else [],
      0.97 - drop * math.exp(-step / 700),
    )
    for stage, start, drop in (("train", 2.3, 0.9), ("finetune", 0.6, 0.2))
    for step in range(0, 3511, 10)
  ]
  payload = sum(layer.payload_bytes for layer in layers)
  dense = sum(map(schema.dense_bytes, layers))
  results = {
    "name": "resnet18 digits",
    "command": (
      "python main.py --config=configs/resnet18_digits.py "
      "--workdir=runs/resnet18_digits --config.seed=0"
    ),
    "versions": {"pqf_jax": "0.1.0", "python": "3.11.7", "jax": "0.10.2"},
    "date": "2001-02-03 04:05 UTC",
    "seed": 17,
    "device": "1 x NVIDIA H100 80GB HBM3",
    "images": 1797,
    "unit": "images",
    "metrics": {"top1": "top-1", "top5": "top-5"},
    "top1_dense": 0.98164,
    "top1_permuted": 0.98165,
    "top1_quantized": 0.71341,
    "top1_calibrated": 0.95217,
    "top1_finetuned": 0.96439,
    "top1_packed": 0.96327,
    "top5_dense": 0.99944,
    "top5_permuted": 0.99943,
    "top5_quantized": 0.93211,
    "top5_calibrated": 0.99612,
    "top5_finetuned": 0.99722,
    "top5_packed": 0.99611,
    "dense_bytes": dense,
    "payload_bytes": payload,
    "file_bytes": payload + 9120,
    "ratio": dense / (payload + 9120),
    "seconds": {
      "train": 412.25,
      "permute": 38.5,
      "quantize": 57.125,
      "finetune": 259.0,
      "pack": 1.75,
    },
    "file": "model.safetensors",
    "distortion": {
      layer.path: float(rng.uniform(0.08, 0.42)) for layer in quantized
    },
  }
  return {
    "results": results,
    "config": {
      "seed": 17,
      "model": {"name": "resnet18", "num_classes": 1000},
      "finetune": {"epochs": 9, "learning_rate": 1e-3},
    },
    "layers": layers,
    "inputs": [((1, 64, 64, 3), "float32")],
    "groups": groups,
    "history": history,
    "pictures": [],
  }

"""ResNets in torch.nn.functional, computed from a state dict and nothing else.

`python -m tests.oracles.torch_resnet` writes tests/goldens/resnet_logits.npz.
"""

import pathlib
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracles import resnet_weights

GOLDEN = pathlib.Path(__file__).parents[1] / "goldens" / "resnet_logits.npz"
EPSILON = 1e-5
MOMENTUM = 0.1


class Result(NamedTuple):
  """Outputs of a forward pass.

  Attributes:
    logits: [B, num_classes].
    state: the state dict, with new running statistics where it trained.
    counts: {norm: B * H * W of its map}.
  """

  logits: np.ndarray
  state: dict[str, np.ndarray]
  counts: dict[str, int]


def forward(
  state_dict: dict[str, np.ndarray],
  images: np.ndarray,
  *,
  dtype: torch.dtype = torch.float64,
  train: bool = False,
) -> Result:
  """Runs the network that the names imply on images [B, H, W, 3]."""
  w = {name: torch.tensor(a, dtype=dtype) for name, a in state_dict.items()}
  counts = {}

  def norm(x: Tensor, name: str) -> Tensor:
    counts[name] = x.numel() // x.shape[1]
    return F.batch_norm(
      x,
      w[f"{name}.running_mean"],
      w[f"{name}.running_var"],
      w[f"{name}.weight"],
      w[f"{name}.bias"],
      training=train,
      momentum=MOMENTUM,
      eps=EPSILON,
    )

  def conv(x: Tensor, name: str, stride: int) -> Tensor:
    kernel = w[f"{name}.weight"]
    return F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

  def block(x: Tensor, name: str, stride: int) -> Tensor:
    if f"{name}.conv3.weight" in w:
      y = F.relu(norm(conv(x, f"{name}.conv1", 1), f"{name}.bn1"))
      y = F.relu(norm(conv(y, f"{name}.conv2", stride), f"{name}.bn2"))
      y = norm(conv(y, f"{name}.conv3", 1), f"{name}.bn3")
    else:
      y = F.relu(norm(conv(x, f"{name}.conv1", stride), f"{name}.bn1"))
      y = norm(conv(y, f"{name}.conv2", 1), f"{name}.bn2")
    if f"{name}.downsample.0.weight" in w:
      x = conv(x, f"{name}.downsample.0", stride)
      x = norm(x, f"{name}.downsample.1")
    return F.relu(x + y)

  x = torch.tensor(images, dtype=dtype).permute(0, 3, 1, 2)
  if w["conv1.weight"].shape[-1] == 7:
    x = F.relu(norm(conv(x, "conv1", 2), "bn1"))
    x = F.max_pool2d(x, 3, stride=2, padding=1)
  else:
    x = F.relu(norm(conv(x, "conv1", 1), "bn1"))
  for stage in (1, 2, 3, 4):
    i = 0
    while f"layer{stage}.{i}.conv1.weight" in w:
      x = block(x, f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1)
      i += 1
  logits = F.linear(x.mean((2, 3)), w["fc.weight"], w["fc.bias"])
  state = {name: tensor.numpy() for name, tensor in w.items()}
  return Result(logits.numpy(), state, counts)


def write_golden() -> None:
  """Stores the float64 logits of every case and statistics after training."""
  golden = {}
  for case, (depth, stem, size) in resnet_weights.CASES.items():
    shapes = resnet_weights.shapes(depth, 10, stem)
    weights = resnet_weights.draw(shapes)
    images = resnet_weights.images(2, *size, 3)
    golden[case] = forward(weights, images).logits
    if case == resnet_weights.TRAIN_CASE:
      result = forward(weights, images, train=True)
      golden["train"] = result.logits
      for name in resnet_weights.TRAIN_STATISTICS:
        golden[name] = result.state[name]
  np.savez(GOLDEN, **golden)


if __name__ == "__main__":
  write_golden()

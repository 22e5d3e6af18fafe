"""MobileNetV2 and EfficientNet-Lite0 in torch.nn.functional.

The networks are computed from a state dict and nothing else.
`python -m tests.oracles.torch_mobile` writes tests/goldens/mobile_logits.npz.
"""

import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracles import mobile_weights, resnet_weights

GOLDEN = pathlib.Path(__file__).parents[1] / "goldens" / "mobile_logits.npz"
MOMENTUM = 0.1


class Network:
  """A state dict and the layers that are computed from it.

  Attributes:
    w: the state dict as tensors, with new running statistics where it trained.
    counts: {norm: B * H * W of its map}.
  """

  def __init__(
    self,
    state_dict: dict[str, np.ndarray],
    *,
    dtype: torch.dtype = torch.float64,
    epsilon: float,
    train: bool = False,
  ) -> None:
    self.w = {k: torch.tensor(v, dtype=dtype) for k, v in state_dict.items()}
    self.counts = {}
    self._dtype, self._epsilon, self._train = dtype, epsilon, train

  def images(self, images: np.ndarray) -> Tensor:
    return torch.tensor(images, dtype=self._dtype).permute(0, 3, 1, 2)

  def conv(self, x: Tensor, name: str, stride: int, padding: int = 0) -> Tensor:
    kernel = self.w[f"{name}.weight"]
    groups = x.shape[1] // kernel.shape[1]
    return F.conv2d(x, kernel, stride=stride, padding=padding, groups=groups)

  def norm(self, x: Tensor, name: str) -> Tensor:
    self.counts[name] = x.numel() // x.shape[1]
    return F.batch_norm(
      x,
      self.w[f"{name}.running_mean"],
      self.w[f"{name}.running_var"],
      self.w[f"{name}.weight"],
      self.w[f"{name}.bias"],
      training=self._train,
      momentum=MOMENTUM,
      eps=self._epsilon,
    )

  def head(self, x: Tensor, name: str) -> np.ndarray:
    weight, bias = self.w[f"{name}.weight"], self.w[f"{name}.bias"]
    return F.linear(x.mean((2, 3)), weight, bias).numpy()


def mobilenet_v2(
  state_dict: dict[str, np.ndarray], images: np.ndarray, **settings
) -> tuple[np.ndarray, Network]:
  """Maps images [B, H, W, 3] to (logits, the network after the pass)."""
  net = Network(state_dict, epsilon=1e-5, **settings)

  def conv_norm_relu(x: Tensor, name: str, stride: int) -> Tensor:
    padding = net.w[f"{name}.0.weight"].shape[-1] // 2
    x = net.conv(x, f"{name}.0", stride, padding)
    return F.relu6(net.norm(x, f"{name}.1"))

  x = conv_norm_relu(net.images(images), "features.0", 2)
  for i, (_, stride) in enumerate(mobile_weights.MOBILENET_V2, start=1):
    name, y, j = f"features.{i}.conv", x, 0
    if f"{name}.1.0.weight" in net.w:
      y, j = conv_norm_relu(y, f"{name}.0", 1), 1
    y = conv_norm_relu(y, f"{name}.{j}", stride)
    y = net.norm(net.conv(y, f"{name}.{j + 1}", 1), f"{name}.{j + 2}")
    x = x + y if stride == 1 and x.shape[1] == y.shape[1] else y
  return net.head(conv_norm_relu(x, "features.18", 1), "classifier.1"), net


def efficientnet_lite0(
  state_dict: dict[str, np.ndarray], images: np.ndarray, **settings
) -> tuple[np.ndarray, Network]:
  """Maps images [B, H, W, 3] to (logits, the network after the pass)."""
  net = Network(state_dict, epsilon=1e-3, **settings)

  def same(x: Tensor, size: int, stride: int) -> Tensor:
    """Pads as TensorFlow: as much as is needed, the odd pixel at the end."""
    pads = []
    for side in (x.shape[3], x.shape[2]):
      total = max((-(-side // stride) - 1) * stride + size - side, 0)
      pads += [total // 2, total - total // 2]
    return F.pad(x, pads)

  def conv_norm(x: Tensor, conv: str, norm: str, stride: int = 1) -> Tensor:
    x = same(x, net.w[f"{conv}.weight"].shape[-1], stride)
    return net.norm(net.conv(x, conv, stride), norm)

  x = F.relu6(conv_norm(net.images(images), "conv_stem", "bn1", 2))
  for stage, blocks in enumerate(mobile_weights.EFFICIENTNET_LITE0):
    for i, (_, stride, _) in enumerate(blocks):
      name = f"blocks.{stage}.{i}"
      if f"{name}.conv_pwl.weight" in net.w:
        y = F.relu6(conv_norm(x, f"{name}.conv_pw", f"{name}.bn1"))
        y = F.relu6(conv_norm(y, f"{name}.conv_dw", f"{name}.bn2", stride))
        y = conv_norm(y, f"{name}.conv_pwl", f"{name}.bn3")
      else:
        y = F.relu6(conv_norm(x, f"{name}.conv_dw", f"{name}.bn1", stride))
        y = conv_norm(y, f"{name}.conv_pw", f"{name}.bn2")
      x = x + y if stride == 1 and x.shape[1] == y.shape[1] else y
  return net.head(F.relu6(conv_norm(x, "conv_head", "bn2")), "classifier"), net


FORWARD = {
  "mobilenet_v2": mobilenet_v2,
  "efficientnet_lite0": efficientnet_lite0,
}


def write_golden() -> None:
  """Stores the float64 logits of evaluation and of training."""
  golden = {}
  images = resnet_weights.images(*mobile_weights.IMAGE_SHAPE)
  for name, forward in FORWARD.items():
    weights = resnet_weights.draw(getattr(mobile_weights, name)())
    golden[name], _ = forward(weights, images)
    golden[f"{name}_train"], _ = forward(weights, images, train=True)
  np.savez(GOLDEN, **golden)


if __name__ == "__main__":
  write_golden()

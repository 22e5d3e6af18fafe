"""Time and memory of Mask R-CNN ResNet-50-FPN here and in torchvision.

    python -m benchmarks.mask_rcnn

Both run in one process, on the same random weights and images:

infer   maps uint8 (ours) or float (torchvision) images on the device to masks
        of 28 x 28 in their boxes, 100 an image
paste   does the same and enlarges the masks to the size of the images, on the
        device, as torchvision does by default
train   computes the five losses and the gradients of all parameters except the
        norms

torchvision is eager, once as it is shipped and once with cuDNN's fastest
algorithms. Matrix products are TF32 on both sides, or float32 with
--products=float32; --dtype=bfloat16 computes in that type (torchvision under
autocast).

Images are 384 x 640, scaled to 799 x 1333 and padded to 800 x 1344. torchvision
needs no compilation; its first call is not timed either. The memory is that of
the compiled program in all, or torch's peak.
"""

import argparse
import functools
import importlib.util
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

# Both libraries share the memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

from pqf_jax.models import mask_rcnn
from pqf_jax.models.mask_rcnn import masks as mask_ops
from pqf_jax.tasks import detection

_NUM_CLASSES = 91
_NUM_OBJECTS = 20
_PADDED = 100


# {name: whether cuDNN searches for its fastest algorithm}.
PEERS = {"torchvision": False, "torchvision tuned": True}


class Timing(NamedTuple):
  """Time and memory of one job in one library.

  Attributes:
    seconds: median of the calls after the first.
    compilation: seconds of the first call minus a later one.
    gibibytes: of memory.
  """

  seconds: float
  compilation: float
  gibibytes: float


Run = Callable[[], Any]
# {--products: (JAX's name of the precision, torch's name)}.
PRODUCTS = {"tf32": ("default", "high"), "float32": ("highest",) * 2}


def make_batch(count: int, height: int, width: int) -> dict[str, np.ndarray]:
  """Draws noise as images and ellipses as objects."""
  rng = np.random.default_rng(0)
  buffer = max(height, width)
  image = np.zeros((count, buffer, buffer, 3), np.uint8)
  image[:, :height, :width] = rng.integers(0, 256, (count, height, width, 3))
  boxes = np.zeros((count, _PADDED, 4), np.float32)
  masks = np.zeros((count, _PADDED, buffer, buffer), bool)
  y, x = np.mgrid[:buffer, :buffer]
  for b in range(count):
    for g in range(_NUM_OBJECTS):
      low = rng.uniform(0, 0.6, 2) * [width, height]
      high = low + rng.uniform(0.05, 0.4, 2) * [width, height]
      boxes[b, g] = [*low, *high]
      (cx, cy), (rx, ry) = (low + high) / 2, (high - low) / 2
      masks[b, g] = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1
  exists = np.arange(_PADDED) < _NUM_OBJECTS
  return {
    "image": image,
    "size": np.tile(np.int32([height, width]), (count, 1)),
    "boxes": boxes,
    "labels": rng.integers(1, _NUM_CLASSES, boxes.shape[:2]).astype(np.int32),
    "valid": np.tile(exists, (count, 1)),
    "masks": np.packbits(masks, axis=-1),
  }


def timed(run: Run, wait: Callable[[Any], Any], repeats: int) -> list[float]:
  """Returns the seconds of the first call and of the others."""
  seconds = []
  for _ in range(repeats + 1):
    start = time.perf_counter()
    wait(run())
    seconds.append(time.perf_counter() - start)
  return seconds


class Ours:
  """The jobs in this library."""

  def __init__(self, options: argparse.Namespace, state: dict[str, Any] | None):
    """Takes the weights from torch's state dict, or draws them."""
    self.model = mask_rcnn.make(
      num_classes=_NUM_CLASSES,
      min_size=options.min_size,
      max_size=options.max_size,
      canvas=tuple(options.canvas),
      dtype=options.dtype,
    )
    images, sizes = jnp.zeros((1, 64, 64, 3), jnp.uint8), jnp.ones((1, 2), int)
    key = jax.random.key(0)
    if state is None:
      self.variables = jax.jit(self.model.init)(key, images, sizes)
    else:
      template = jax.eval_shape(self.model.init, key, images, sizes)
      self.variables = mask_rcnn.load_torch(state, template)
    self.repeats = options.repeats

  def infer(self, batch: dict[str, np.ndarray]) -> Timing:
    """Times detection."""
    batch = jax.device_put({name: batch[name] for name in ("image", "size")})
    return self._time(self.model.apply, self.variables, *batch.values())

  def paste(self, batch: dict[str, np.ndarray]) -> Timing:
    """Times detection with masks of the size of the images' buffer."""
    batch = jax.device_put({name: batch[name] for name in ("image", "size")})
    canvas = batch["image"].shape[1:3]

    def run(variables: Any, images: jax.Array, sizes: jax.Array) -> Any:
      detections = self.model.apply(variables, images, sizes)
      paste = functools.partial(mask_ops.paste_on_device, canvas=canvas)
      masks = jax.vmap(paste)(detections.masks, detections.boxes)
      return detections._replace(masks=masks)

    return self._time(run, self.variables, *batch.values())

  def train(self, batch: dict[str, np.ndarray]) -> Timing:
    """Times losses and gradients."""
    loss_fn = detection.make_loss(
      functools.partial(self.model.apply, method="training_outputs")
    )

    def loss_of(params: Any, rest: Any, batch: Any) -> Any:
      norms, kernels = rest
      merged = jax.tree.map(
        lambda a, b: b if a is None else a,
        params,
        kernels,
        is_leaf=lambda leaf: leaf is None,
      )
      variables = {"params": merged, "batch_stats": norms}
      return loss_fn(variables, batch, jax.random.key(0))

    params = self.variables["params"]

    def part(wanted: bool) -> Any:
      return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if _is_norm(path) == wanted else None, params
      )

    rest = self.variables["batch_stats"], part(True)
    gradient = jax.value_and_grad(loss_of, has_aux=True)
    return self._time(gradient, part(False), rest, jax.device_put(batch))

  def _time(self, function: Callable[..., Any], *arguments: Any) -> Timing:
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    compilation = time.perf_counter() - start
    seconds = timed(
      lambda: compiled(*arguments), jax.block_until_ready, self.repeats
    )
    memory = compiled.memory_analysis()
    size = sum(
      getattr(memory, f"{kind}_size_in_bytes")
      for kind in ("temp", "argument", "output")
    )
    return Timing(float(np.median(seconds[1:])), compilation, size / 2**30)


def _is_norm(path: tuple[Any, ...]) -> bool:
  names = [entry.key for entry in path]
  return "body" in names and names[-1] != "kernel"


class Torchvision:
  """The jobs in torchvision."""

  def __init__(self, options: argparse.Namespace, *, tuned: bool):
    """Draws weights whose scores are high enough for 100 detections."""
    import torch  # optional peer
    from torchvision.models import detection as peers
    from torchvision.models.detection import backbone_utils
    from torchvision.ops import misc

    torch.manual_seed(0)
    torch.set_float32_matmul_precision(PRODUCTS[options.products][1])
    torch.backends.cudnn.allow_tf32 = options.products == "tf32"
    backbone = backbone_utils.resnet_fpn_backbone(
      backbone_name="resnet50",
      weights=None,
      norm_layer=functools.partial(misc.FrozenBatchNorm2d, eps=0.0),
      trainable_layers=5,
    )
    self.torch, self.repeats, self.tuned = torch, options.repeats, tuned
    self.is_cuda = torch.cuda.is_available()
    self.device = "cuda" if self.is_cuda else "cpu"
    self.autocast = options.dtype == "bfloat16"
    self.model = peers.MaskRCNN(
      backbone,
      _NUM_CLASSES,
      min_size=options.min_size,
      max_size=options.max_size,
    )
    with torch.no_grad():
      self.model.roi_heads.box_predictor.cls_score.weight.mul_(100)
    self.model.to(self.device)

  def state(self) -> dict[str, np.ndarray]:
    """Returns the weights as a state dict of NumPy arrays."""
    tensors = self.model.state_dict()
    return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}

  def infer(self, batch: dict[str, np.ndarray]) -> Timing:
    """Times detection."""
    transform = self.model.transform
    transform.postprocess = lambda detections, *sizes: detections
    try:
      return self.paste(batch)
    finally:
      del transform.postprocess  # The class has the real one.

  def paste(self, batch: dict[str, np.ndarray]) -> Timing:
    """Times detection with masks of the size of the images."""
    images, _ = self._load(batch)
    self.model.eval()

    def run() -> Any:
      with self.torch.no_grad():
        return self.model(images)

    return self._time(run)

  def train(self, batch: dict[str, np.ndarray]) -> Timing:
    """Times losses and gradients."""
    images, targets = self._load(batch)
    self.model.train()

    def run() -> None:
      self.model.zero_grad()
      # The transform replaces entries of the targets.
      sum(self.model(images, [dict(t) for t in targets]).values()).backward()

    return self._time(run)

  def _load(self, batch: dict[str, np.ndarray]) -> tuple[list[Any], list[Any]]:
    tensor = functools.partial(self.torch.tensor, device=self.device)
    images, targets = [], []
    for b, (height, width) in enumerate(batch["size"]):
      image = tensor(batch["image"][b, :height, :width])
      images.append(image.permute(2, 0, 1).float() / 255)
      exists = batch["valid"][b]
      masks = np.unpackbits(batch["masks"][b][exists], axis=-1)
      targets.append(
        {
          "boxes": tensor(batch["boxes"][b][exists]),
          "labels": tensor(batch["labels"][b][exists]).long(),
          "masks": tensor(masks[:, :height, :width].copy()),
        }
      )
    return images, targets

  def _time(self, run: Run) -> Timing:
    torch = self.torch
    torch.backends.cudnn.benchmark = self.tuned

    def cast() -> Any:
      with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
        return run()

    if self.is_cuda:
      torch.cuda.reset_peak_memory_stats()
    seconds = timed(
      cast,
      lambda _: torch.cuda.synchronize() if self.is_cuda else None,
      self.repeats,
    )
    peak = torch.cuda.max_memory_allocated() if self.is_cuda else 0
    median = float(np.median(seconds[1:]))
    if self.is_cuda:
      torch.cuda.empty_cache()
    return Timing(median, seconds[0] - median, peak / 2**30)


def main() -> None:
  """Prints a table with one row for every job and library."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument(
    "--jobs",
    nargs="+",
    default=["infer:1", "infer:8", "paste:1", "paste:8", "train:2", "train:8"],
    help="infer:B, paste:B or train:B, B images each",
  )
  parser.add_argument("--image", nargs=2, type=int, default=[384, 640])
  parser.add_argument("--canvas", nargs=2, type=int, default=[800, 1344])
  parser.add_argument("--min-size", type=int, default=800)
  parser.add_argument("--max-size", type=int, default=1333)
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--repeats", type=int, default=20)
  parser.add_argument("--products", choices=list(PRODUCTS), default="tf32")
  parser.add_argument("--peers", nargs="*", default=list(PEERS))
  options = parser.parse_args()

  peers = {}
  if importlib.util.find_spec("torchvision"):
    for name in options.peers:
      peers[name] = Torchvision(options, tuned=PEERS[name])
  state = next(iter(peers.values())).state() if peers else None
  libraries = {"pqf_jax": Ours(options, state), **peers}
  jax.config.update(
    "jax_default_matmul_precision", PRODUCTS[options.products][0]
  )
  print(
    f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {options.dtype}, "
    f"products {options.products}, median of {options.repeats} calls\n"
  )
  print("| job | library | ms | images/s | first call, s | GiB |")
  print("|---|---|---|---|---|---|")
  for job in options.jobs:
    kind, count = job.split(":")
    batch = make_batch(int(count), *options.image)
    for name, library in libraries.items():
      timing = getattr(library, kind)(batch)
      print(
        f"| {job} | {name} | {timing.seconds * 1e3:.2f} |"
        f" {int(count) / timing.seconds:.1f} | {timing.compilation:.1f} |"
        f" {timing.gibibytes:.2f} |",
        flush=True,
      )


if __name__ == "__main__":
  main()

"""torchvision's Mask R-CNN on the weights of `mask_rcnn_weights`.

`python -m tests.oracles.torchvision_mask_rcnn` writes
tests/goldens/mask_rcnn.npz. Importing this needs a working torchvision.
"""

import pathlib

import numpy as np
import torch
from torchvision.models import detection
from torchvision.models.detection import _utils, backbone_utils
from torchvision.ops import misc

from tests.oracles import mask_rcnn_weights

GOLDEN = pathlib.Path(__file__).parents[1] / "goldens" / "mask_rcnn.npz"


def build(
  case: mask_rcnn_weights.Case, dtype: torch.dtype = torch.float64
) -> detection.MaskRCNN:
  """Builds the network in evaluation mode, all of its parameters trainable."""
  backbone = backbone_utils.resnet_fpn_backbone(
    backbone_name=f"resnet{case.depth}",
    weights=None,
    norm_layer=misc.FrozenBatchNorm2d,
    trainable_layers=5,
  )
  model = detection.MaskRCNN(
    backbone,
    case.num_classes,
    min_size=case.min_size,
    max_size=case.max_size,
    rpn_pre_nms_top_n_test=case.num_proposals,
    rpn_post_nms_top_n_test=case.num_proposals,
    rpn_pre_nms_top_n_train=case.num_proposals,
    rpn_post_nms_top_n_train=case.num_proposals,
    rpn_batch_size_per_image=mask_rcnn_weights.NUM_ANCHORS,
    box_batch_size_per_image=mask_rcnn_weights.NUM_BOXES,
    box_detections_per_img=case.num_detections,
  )
  _utils.overwrite_eps(model, 0.0)
  model.to(dtype)  # before the weights, which float32 would round
  weights = mask_rcnn_weights.draw(case.depth, case.num_classes)
  state = {name: torch.tensor(array) for name, array in weights.items()}
  model.load_state_dict(state)
  return model.eval()


def detect(
  model: detection.MaskRCNN, image: np.ndarray
) -> dict[str, np.ndarray]:
  """Returns {boxes, labels, scores, masks [N, H, W]} of one uint8 image."""
  for pool in (model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool):
    pool.scales = None  # or else those of the first image are kept
  with torch.no_grad():
    detections = model([_tensor(model, image)])[0]
  detections["masks"] = detections["masks"][:, 0]
  return {name: tensor.numpy() for name, tensor in detections.items()}


def losses(
  model: detection.MaskRCNN, batch: dict[str, np.ndarray]
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
  """Returns (the five losses, gradients of their sum by first names).

  Samples are drawn in the order of their numbers.
  """
  model.train()
  for pool in (model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool):
    pool.scales = None
  images, targets = [], []
  for b, (height, width) in enumerate(batch["size"]):
    valid = batch["valid"][b]
    masks = np.unpackbits(batch["masks"][b][valid], axis=-1)
    images.append(_tensor(model, batch["image"][b, :height, :width]))
    targets.append(
      {
        "boxes": torch.tensor(batch["boxes"][b][valid]).to(images[0].dtype),
        "labels": torch.tensor(batch["labels"][b][valid]).long(),
        "masks": torch.tensor(masks[:, :height, :width].copy()),
      }
    )
  random_order = torch.randperm
  torch.randperm = lambda count, **settings: torch.arange(count)
  try:
    by_name = model(images, targets)
  finally:
    torch.randperm = random_order
    model.eval()
  model.zero_grad()
  sum(by_name.values()).backward()
  first = mask_rcnn_weights.first_names()
  gradients = {
    first[name]: parameter.grad.numpy()
    for name, parameter in model.named_parameters()
    if parameter.grad is not None
  }
  return {name: float(x.detach()) for name, x in by_name.items()}, gradients


def _tensor(model: detection.MaskRCNN, image: np.ndarray) -> torch.Tensor:
  dtype = next(model.parameters()).dtype
  return torch.tensor(image).permute(2, 0, 1).to(dtype) / 255


def write_golden() -> None:
  """Stores torchvision's detections, losses and gradients in float64."""
  golden = {}
  for name, case in (
    ("small", mask_rcnn_weights.SMALL),
    ("deep", mask_rcnn_weights.DEEP),
  ):
    model = build(case)
    images, sizes = mask_rcnn_weights.batch(case.sizes, case.buffer)
    for i, (height, width) in enumerate(sizes):
      arrays = detect(model, images[i, :height, :width])
      arrays["masks"] = np.packbits(arrays["masks"] > 0.5, axis=-1)
      golden |= {f"{name}/{i}/{entry}": x for entry, x in arrays.items()}
  model = build(mask_rcnn_weights.TRAINING)
  by_name, gradients = losses(model, mask_rcnn_weights.training_batch())
  golden |= {f"losses/{name}": loss for name, loss in by_name.items()}
  summaries = mask_rcnn_weights.summarize(gradients)
  golden |= {f"gradients/{name}": pair for name, pair in summaries.items()}
  np.savez_compressed(GOLDEN, **golden)


if __name__ == "__main__":
  write_golden()

"""Mask R-CNN with ResNet-50-FPN, which detects objects and their masks.

python main.py --config=configs/mask_rcnn.py:coco \
        --config.data.dir=DIR --config.weights=FILE
COCO 2017 and torchvision's weights. Published: 6.65 MiB (25.5x), box AP 36.3
and mask AP 33.5, from 37.9 and 34.6.

python main.py --config=configs/mask_rcnn.py:nuclei \
        --config.data.dir=DIR --config.backbone=hf://timm/resnet50.tv_in1k
Cell nuclei of the Data Science Bowl 2018 (CC0; 421 + 109 images), or any folder
in COCO's layout with one category: trains the detector from an ImageNet
backbone, compresses it and fine-tunes. On one H100: mask AP .557 dense, .540
at 26.0x, see docs/nuclei.md. These settings follow from the 12,240 training
nuclei:

  images       256 to 360 pixels. Scaled to 512 on the long side, one canvas of
               512 x 512: a quarter of the pixels of 800 x 1333.
  box sizes    root of the area, pixels of the scaled image, at quantiles 0,
               .01, .05, .25, .5, .75, .95, .99, 1:
               6, 10, 12, 22, 30, 43, 77, 95, 186.
  anchors      12, 24, 48, 96, 192, ratios .5, 1, 2: the best anchor has IoU
               .5 or more with 96.7 % of the boxes and below .3 with 0.1 %
               (torchvision's 32 to 512: 71.4 % and 13.6 %).
  objects      at most 98 an image (99 in the test images), median 23: 100
               detections are enough, and COCO's AP looks at no more.
  mask AP      pasting a mask rounds its box to whole pixels, as in
               torchvision. Perfect boxes with perfect 28 x 28 masks get .738.
"""

import ml_collections

import pqf_jax
from configs import common

BODY, HEADS = "params/backbone/body/", "params/roi_heads/"
# As in the paper: sub-vectors of 4 weights, 9 in 3x3 convolutions, 16 in fc6.
# The layers that stay dense are small, and all outputs depend on them.
STEPS = 1000
IN_OUT = pqf_jax.KernelAxes(inputs=(2,), outputs=(3,))
RULES = (
  (f"{BODY}conv1/kernel", None, 1, STEPS),
  ("params/rpn/head/(cls_logits|bbox_pred)/kernel", None, 1, STEPS),
  (f"{HEADS}mask_predictor/mask_fcn_logits/kernel", None, 1, STEPS),
  (f"{BODY}layer1/0/conv1/kernel", 128, 4, STEPS),
  (f"{BODY}layer./.*(conv[13]|downsample/0)/kernel", 256, 4, STEPS),
  (f"{BODY}layer./.*conv2/kernel", 256, 1, STEPS),
  ("params/backbone/fpn/inner_blocks/./kernel", 256, 4, STEPS),
  ("params/backbone/fpn/layer_blocks/./kernel", 256, 1, STEPS),
  ("params/rpn/head/conv/kernel", 256, 1, STEPS),
  (f"{HEADS}box_head/fc6(_hwc)?/kernel", 256, 16, STEPS),
  (f"{HEADS}(box_head/fc7|box_predictor/.*)/kernel", 256, 4, STEPS),
  (f"{HEADS}mask_head/mask_fcn./kernel", 256, 1, STEPS),
  # Transposed, 2x2: four taps a channel, though the network multiplies by all.
  (f"{HEADS}mask_predictor/conv5_mask/kernel", 256, 1, STEPS, IN_OUT),
)


# Norms of the body that no training changes. torchvision and the paper freeze
# all of them. The authors' code freezes only those whose channel order is not
# searched, since it turns the others into new parameters: 37 of 53 are trained.
FROZEN = {
  "frozen_norms": (f"{BODY}.*bn./.*", f"{BODY}.*/downsample/1/.*"),
  "authors_norms": (f"{BODY}layer././bn1/.*",),
  "trained_norms": (),
}


def get_config(variant: str = "coco") -> ml_collections.ConfigDict:
  """Returns the recipe.

  Args:
    variant: coco or nuclei; frozen_norms (the default), authors_norms or
      trained_norms; and paper (the default) or best.

  Raises:
    ValueError: an unknown word, two of a kind, or best without nuclei.
  """
  words = common.variant_words(
    variant, ("coco", "nuclei", *FROZEN, *common.RECIPES)
  )
  dataset = _one_of(words, ("coco", "nuclei"))
  norms = _one_of(words, tuple(FROZEN))
  best = _one_of(words, common.RECIPES) == "best"

  config = common.get_config()
  config.task = "detection"
  config.name = f"mask_rcnn_{dataset}"
  config.model.name = "mask_rcnn"
  config.model.fc6_layout = "chw"  # or hwc, see models.mask_rcnn.make
  config.data.name = "coco"  # the layout of the folder in both variants
  config.rules = RULES
  config.frozen = FROZEN[norms]
  # Neither the gain nor the memory was measured on COCO.
  config.calibrate.images = 0
  config.finetune.epochs = 4
  config.finetune.batch_size = 2
  config.finetune.learning_rate = 5e-5
  config.eval_batch_size = 4
  if dataset == "coco":
    config.model.num_classes = 91  # labels are COCO's category ids
    config.model.min_size = 800
    config.model.max_size = 1333
    config.model.norm_epsilon = 0.0  # of torchvision's COCO_V1 weights
    if best:
      raise ValueError("best was measured on nuclei alone: name both words")
    return config
  config.model.num_classes = 2
  config.model.min_size = 512
  config.model.max_size = 512
  config.model.norm_epsilon = 1e-5
  config.model.anchor_sizes = ((12,), (24,), (48,), (96,), (192,))
  # An epoch has 105 steps, and an evaluation takes about as long as an epoch.
  config.train.epochs = 16
  config.train.batch_size = 4
  config.train.learning_rate = 2e-4
  config.train.evaluation_epochs = 8
  # The paper's 5e-5 is meant for 235,000 steps.
  config.finetune.epochs = 6
  config.finetune.batch_size = 4
  config.finetune.learning_rate = 3e-4
  config.finetune.evaluation_epochs = 3
  config.eval_batch_size = 8
  config.calibrate.images = 32
  if best:  # docs/nuclei.md
    config.name += "_best"
    config.storage.rest = "float16"  # int8 codebooks lose .7 of mask AP
    config.finetune_from = "calibrated"
    config.finetune.learning_rate = 1e-4
    config.finetune.ema_decay = 0.99
    config.distillation.share = 1.0
  return config


def _one_of(words: set[str], choices: tuple[str, ...]) -> str:
  """Returns the word that is one of the choices, or else the first choice."""
  named = sorted(words & set(choices)) or [choices[0]]
  if len(named) > 1:
    raise ValueError(f"name one of {', '.join(choices)}, not {named}")
  return named[0]

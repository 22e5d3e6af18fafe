"""Your own images in folders, with a network trained on ImageNet.

python main.py --config=configs/own_images.py[:ARCHITECTURE][,large][,best] \
        --config.data.dir=DIR [--config.backbone=FILE]
DIR holds train/CLASS/* and val/CLASS/*; the classes are counted. ARCHITECTURE
is mobilenet_v2, resnet18, resnet50 or efficientnet_lite0. Stage 0 trains a new
head, and the rest at .3 of its rate, from the hub's ImageNet weights or
those of FILE (torch's names, any number of classes); then the whole job runs.
--config.weights=FILE with your own trained network leaves stage 0 out.
Small images stay as they are: docs/own_images.md has sizes and augmentation.
"""

import ml_collections

from configs import (
  common,
  efficientnet_lite0,
  mobilenet_v2,
  resnet18,
  resnet50,
)

ARCHITECTURES = {
  "mobilenet_v2": mobilenet_v2,
  "resnet18": resnet18,
  "resnet50": resnet50,
  "efficientnet_lite0": efficientnet_lite0,
}
# The recipe of MobileNetV2 names none.
MOBILENET_V2 = "hf://timm/mobilenetv2_100.ra_in1k"


def get_config(variant: str = "mobilenet_v2") -> ml_collections.ConfigDict:
  """Returns the recipe.

  Args:
    variant: mobilenet_v2, resnet18, resnet50 or efficientnet_lite0; [large],
      [best].
  """
  words = common.variant_words(
    variant, (*ARCHITECTURES, "large", *common.RECIPES)
  )
  chosen = sorted(words & {*ARCHITECTURES}) or ["mobilenet_v2"]
  if len(chosen) > 1:
    raise ValueError(f"name one architecture, not {', '.join(chosen)}")
  others = sorted(words - {*chosen})
  config = ARCHITECTURES[chosen[0]].get_config(
    ",".join(["imagenet2012", *others])
  )
  config.name = config.name.replace("imagenet2012", "own_images")
  config.backbone, config.weights = config.weights or MOBILENET_V2, ""
  config.model.num_classes = 0
  # The rules decide: their bytes are not known before the classes are.
  config.target_bytes = 0
  config.data.name = "image_folder"
  # Hundreds of images: few steps an epoch, so more epochs in smaller batches.
  config.train.epochs = 20
  config.train.evaluation_epochs = 5
  config.train.batch_size = 32
  config.train.backbone_rate = 0.3
  config.finetune_from = "calibrated"
  config.finetune.epochs = 20
  config.finetune.evaluation_epochs = 5
  config.finetune.batch_size = 32
  config.eval_batch_size = 64
  return config

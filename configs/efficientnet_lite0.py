"""EfficientNet-Lite0 on ImageNet.

python main.py --config.data.dir=DIR \
        --config=configs/efficientnet_lite0.py:imagenet2012[,large][,best]
The result has 1,551,894 bytes (12.0x smaller), large 1,017,972 (18.3x), without
the header. The weights come from the hub.
"""

import ml_collections

from configs import common


def get_config(variant: str = "imagenet2012") -> ml_collections.ConfigDict:
  """Returns the recipe.

  Args:
    variant: imagenet2012, [large], [best].
  """
  words = common.variant_words(
    variant, ("imagenet2012", "large", *common.RECIPES)
  )
  large = "large" in words

  config = common.get_config()
  config.name = "_".join(
    ["efficientnet_lite0", "imagenet2012"] + ["large"] * large
  )
  config.weights = "hf://timm/tf_efficientnet_lite0.in1k"
  config.model.name = "efficientnet_lite0"
  config.model.num_classes = 1000
  config.data.name = "imagenet2012"
  config.data.mean = (127 / 255,) * 3  # (x - 127) / 128 for x in 0..255
  config.data.std = (128 / 255,) * 3
  channels, steps = (8 if large else 4), 1000
  # Dense depthwise kernels would be a third of the file, and more with large
  # blocks, so each channel's 9 or 25 weights are a sub-vector. But the first
  # five layers have too few channels to learn codebooks from: before
  # fine-tuning 48 of 100 test images are classified correctly if they stay
  # dense, and none if they are quantized.
  config.rules = (
    ("params/conv_stem/kernel", None, 1, steps),
    ("params/blocks/[0-2]/.*/conv_dw/kernel", None, 1, steps),
    ("params/blocks/.*/conv_dw/kernel", 256, 1, steps),
    ("params/(blocks/.*/conv_pwl?|conv_head)/kernel", 256, channels, steps),
    ("params/classifier/kernel", 1024, channels, steps),
  )
  # The activations of these images are in memory, layer by layer.
  config.calibrate.images = 256
  config.finetune.batch_size = 64
  return common.choose_recipe(config, words, 1_017_972 if large else 1_551_894)

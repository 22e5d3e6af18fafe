"""MobileNetV2 on ImageNet.

python main.py --config=configs/mobilenet_v2.py:imagenet2012[,large] \
        --config.data.dir=DIR --config.weights=FILE.safetensors
1,198,044 bytes (11.7x smaller), large 785,196 (17.9x), without the header.
"""

import ml_collections

from configs import common


def get_config(variant: str = "imagenet2012") -> ml_collections.ConfigDict:
  """The recipe; variant: imagenet2012, [large]."""
  large = "large" in common.variant_words(variant, ("imagenet2012", "large"))

  config = common.get_config()
  config.name = "_".join(["mobilenet_v2", "imagenet2012"] + ["large"] * large)
  config.model.name = "mobilenet_v2"
  config.model.num_classes = 1000
  config.data.name = "imagenet2012"
  channels, steps = (8 if large else 4), 1000
  # Dense, the depthwise kernels would be a fifth of the file, and with large
  # blocks more, so they are sub-vectors of a channel's 9 weights. But the first
  # six have too few channels to learn codebooks from, and dense they are 3 %.
  # With nothing but depthwise kernels quantized, before fine-tuning, 58 of 100
  # test images are right where these stay dense, none where they do not.
  config.rules = (
    ("params/features/0/0/kernel", None, 1, steps),
    ("params/features/(1/conv/0|[2-6]/conv/1)/0/kernel", None, 1, steps),
    ("params/features/.*/conv/1/0/kernel", 256, 1, steps),
    ("params/features/.*/kernel", 256, channels, steps),
    ("params/classifier/1/kernel", 1024, channels, steps),
  )
  config.finetune.batch_size = 64
  return config

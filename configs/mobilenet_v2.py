"""MobileNetV2 on ImageNet.

python main.py --config=configs/mobilenet_v2.py:imagenet2012[,large] \
        --config.data.dir=DIR --config.weights=FILE.safetensors
1,198,044 bytes (11.7x smaller), large 785,196 (17.9x), without the header.
Two other rules for the depthwise kernels, to compare with (docs/ablation.md):
dense_depthwise keeps all of them, 1,401,828 and 988,980 bytes; uniform treats
them as the rest, with blocks of 4 in the classifier, 1,172,460 and 951,420.
"""

import ml_collections

from configs import common

DEPTHWISE = "params/features/(1/conv/0|.*/conv/1)/0/kernel"
# Dense, the depthwise kernels would be a fifth of the file, and with large
# blocks more, so they are sub-vectors of a channel's 9 weights. But the first
# six have too few channels to learn codebooks from, and dense they are 3 %.
# With nothing but depthwise kernels quantized, before fine-tuning, 58 of 100
# test images are right where these stay dense, none where they do not.
FIRST_DEPTHWISE = "params/features/(1/conv/0|[2-6]/conv/1)/0/kernel"


def get_config(variant: str = "imagenet2012") -> ml_collections.ConfigDict:
  """The recipe; variant: imagenet2012, [large], [dense_depthwise, uniform]."""
  extras = ("large", "dense_depthwise", "uniform")
  words = common.variant_words(variant, ("imagenet2012", *extras))
  large, uniform = "large" in words, "uniform" in words
  if uniform and "dense_depthwise" in words:
    raise ValueError("name one rule: dense_depthwise or uniform")

  config = common.get_config()
  chosen = [word for word in extras if word in words]
  config.name = "_".join(["mobilenet_v2", "imagenet2012", *chosen])
  config.model.name = "mobilenet_v2"
  config.model.num_classes = 1000
  config.data.name = "imagenet2012"
  channels, steps = (8 if large else 4), 1000
  if uniform:
    depthwise = ((DEPTHWISE, 256, 1, steps),)
  elif "dense_depthwise" in words:
    depthwise = ((DEPTHWISE, None, 1, steps),)
  else:
    depthwise = (
      (FIRST_DEPTHWISE, None, 1, steps),
      (DEPTHWISE, 256, 1, steps),
    )
  config.rules = (
    ("params/features/0/0/kernel", None, 1, steps),
    *depthwise,
    ("params/features/.*/kernel", 256, channels, steps),
    ("params/classifier/1/kernel", 1024, 4 if uniform else channels, steps),
  )
  config.finetune.batch_size = 64
  return config

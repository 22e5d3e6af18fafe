"""MobileNetV2 on ImageNet.

python main.py --config=configs/mobilenet_v2.py:imagenet2012[,large][,best] \
        --config.data.dir=DIR --config.weights=FILE.safetensors
The result has 1,198,044 bytes (11.7x smaller), large 785,196 (17.9x), without
the header. Two other rules for the depthwise kernels serve as a comparison
(docs/ablation.md): dense_depthwise keeps all of them, 1,401,828 and 988,980
bytes; uniform treats them like other kernels, with blocks of 4 in the
classifier, 1,172,460 and 951,420.
"""

import ml_collections

from configs import common

DEPTHWISE = "params/features/(1/conv/0|.*/conv/1)/0/kernel"
# Dense depthwise kernels would be a fifth of the file, and more with large
# blocks, so each channel's 9 weights are a sub-vector. But the first six layers
# have too few channels to learn codebooks from, and take only 3 % if dense.
# If only depthwise kernels are quantized, and not fine-tuned, 58 of 100 test
# images are classified correctly if these stay dense, and none otherwise.
FIRST_DEPTHWISE = "params/features/(1/conv/0|[2-6]/conv/1)/0/kernel"


def get_config(variant: str = "imagenet2012") -> ml_collections.ConfigDict:
  """Returns the recipe.

  Args:
    variant: imagenet2012, [large], [dense_depthwise or uniform], [best].
  """
  extras = ("large", "dense_depthwise", "uniform")
  words = common.variant_words(
    variant, ("imagenet2012", *extras, *common.RECIPES)
  )
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
  # The activations of these images are in memory, layer by layer.
  config.calibrate.images = 256
  config.finetune.batch_size = 64
  return common.choose_recipe(config, words, 785_196 if large else 1_198_044)

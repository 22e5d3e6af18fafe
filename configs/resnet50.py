"""ResNet-50 (v1.5) on ImageNet.

python main.py --config=configs/resnet50.py:imagenet2012[,large|,ssl][,best] \
        --config.data.dir=DIR
The paper: 5.09 MiB (19x) 75.04 % top-1, large 3.19 MiB (31x) 72.18 %; of 76.15.
ssl, semi-supervised weights: 5.09 MiB (19x) 77.19 % top-1, of 78.72.
The weights come from the hub; those of ssl are CC-BY-NC 4.0, not for commerce.
Nine epochs take 83 minutes of steps on one H100 (2,314 images/s in batches of
64, measured; 65 minutes in batches of 128) if the loader keeps up, and at least
65 minutes on a v5e-8 (the compiler's estimate, docs/scale.md). On an H100
k-means takes 22 s with its compilation.
"""

import ml_collections

from configs import common


def get_config(variant: str = "imagenet2012") -> ml_collections.ConfigDict:
  """Returns the recipe.

  Args:
    variant: imagenet2012, [large], [ssl], [best].
  """
  extras = ("large", "ssl")
  words = common.variant_words(
    variant, ("imagenet2012", *extras, *common.RECIPES)
  )
  large = "large" in words

  config = common.get_config()
  chosen = [word for word in extras if word in words]
  config.name = "_".join(["resnet50", "imagenet2012", *chosen])
  config.weights = "hf://timm/" + (
    "resnet50.fb_ssl_yfcc100m_ft_in1k" if "ssl" in words else "resnet50.tv_in1k"
  )
  config.model.name = "resnet"
  config.model.depth = 50
  config.model.num_classes = 1000
  config.model.stem = "imagenet"
  config.data.name = "imagenet2012"
  config.rules = common.resnet_rules(
    conv3x3="params/layer././conv2/kernel",
    conv1x1="params/layer./.*(conv[13]|downsample/0)/kernel",
    large=large,
    channels1x1=8 if large else 4,
    fc_codes=1024,
  )
  # The activations of these images are in memory, layer by layer.
  config.calibrate.images = 256
  config.finetune.batch_size = 64
  return common.choose_recipe(config, words, 3_339_872 if large else 5_339_296)
